"""Selection: which pairs the model learns from.

In come the pairs of an iteration, what the judge says of them and clusters of instructions; out comes a `Selected`
record for every pair, kept or dropped and why. `ranking.py` makes one number of a pair's readings, `rules.py` is the
table of rules, `select.py` applies one. Imports from the loop: records, the verdicts of `filters`, the readings and how
scores are read; else only config and errors.
"""
