"""The stages of an iteration, a module each; `table.py` lists them with what they read, write and depend on.

A stage takes a `StageContext`, a model and the records of earlier stages, opens itself in the context, puts a record
for each item, and returns all its records. It may import all of `loop` but `algorithm.py`.
"""
