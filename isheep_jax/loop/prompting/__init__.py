"""Prompting: the prompts for new instructions and for responses, and how their completions are parsed.

Templates and seed tasks come in, requests go out; completions come back and become instructions or responses.
`methods` has an entry per method (few-shot, topics, similar pairs; zero-shot, principles), which implements one of the
two protocols in `protocols`. Imports the loop's context, records and filters, `measure` for embeddings, and
`decode.requests` and `text.conversation`.
"""
