"""Filters: rules that drop instructions and responses before they are scored, and measures of their similarity.

Texts come in, verdicts with fixed reasons go out: completeness (`verdicts`), well-formedness (`text_rules`, `junk`),
novelty against the earlier instructions (`novelty`, with the exact ROUGE-L search in `rouge`), and clusters of
embeddings (`clusters`). `blind_spots` finds responses that a reading rewards for the wrong reason. `labels` knows
the labels of the form in which tasks are written, `normalization` says when two texts count as the same, and `held_out`
whether a text is in an evaluation set.
Imports only the loop's records and `decode.requests`.
"""
