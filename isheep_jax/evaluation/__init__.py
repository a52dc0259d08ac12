"""Evaluation tasks: held-out measurements of a model.

`tasks.py` is the table of tasks; each task has a module of its own. In goes a model of the loop's `Model` protocol, out
comes a `TaskResult` of JSON values (accuracy, standard error, count, a few example answers), which the loop writes to
`evaluation.json` and the console, the model card and the studies show. A task also lists the texts that a run must
never train on. May import: config, errors, distributed, files, chat_server, decode.requests, text.conversation,
loop.protocols, loop.records, loop.stage_files and tiny.
"""
