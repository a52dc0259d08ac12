"""The loop: I-SHEEP, SELF-ALIGN and ISARA as stages of records, from seeds to a better model, without its arrays.

The life of a record: `synthesize` reads an `Instruction` out of a completion, with a verdict (kept, or dropped for a
reason). `respond` makes a `Pair` of each kept instruction and a response, again with a verdict. `assess` gives each
kept pair its `Scores`. `select` joins pair and scores into a `Selected`, whose verdict is the last one. `fine_tune`
learns from the kept ones. Dropped records stay in the run directory with their reason; ids tell where each comes from.

`algorithm.py` is an iteration from top to bottom. `stages/table.py` lists the stages, `context.py` opens them,
`run_directory.py` and `stage_files.py` keep what they write. `prompting/` makes prompts, `filters/` drops text,
`judging/` scores, `selection/` chooses. The model is only seen through `protocols.py`.
It may import config, chat_server, files, distributed, errors, and the plain data of `decode.requests`, `sft.examples`
and `text.conversation`.
"""
