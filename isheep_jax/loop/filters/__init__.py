"""Filters: what drops an instruction or a response before any score is asked for, and how alike two of them are.

Texts come in, verdicts with fixed reasons go out: completeness (`verdicts`), well-formedness (`text_rules`), novelty
against the earlier instructions (`novelty`, with the exact ROUGE-L search in `rouge`), and clusters of embeddings
(`clusters`). `normalization` says when two texts count as the same. Imports only the loop's records and
`decode.requests`.
"""
