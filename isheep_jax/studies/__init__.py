"""Studies: the rows of the paper's tables and of this project's own, each run over several seeds and compared.

A study is a table of settings (`definitions`); each of its runs is a run of the loop (`runs`), which takes over the
stages that it shares with other runs (`sharing`). Results become Markdown, JSON (`report`) or a picture (`figure`).
May import the loop, the table of evaluation tasks, and what these may import; the command `study` gives it the
backend.
"""
