"""The network: a decoder-only transformer as pure functions on a parameter tree.

In go parameters, tokens and positions; out come hidden states, logits and a KV cache. `architecture` says what a model
looks like and has the one table of parameters; `transformer` is the forward pass of training, prefill, scoring and
decoding; `attention*` has an implementation per platform. Knows no files, no text and no requests. May import sharding,
config and errors.
"""
