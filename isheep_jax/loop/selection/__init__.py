"""Selection: which scored pairs the model learns from.

In come the pairs of an iteration, their scores and what else a rule looks at (perplexities, clusters); out comes a
`Selected` record for every pair, kept or dropped and why. `rules.py` is the table of rules, `select.py` applies one.
Imports from the loop: records, the verdicts of `filters`, and how scores are read; else only config and errors.
"""
