"""The network: a decoder-only transformer as pure functions on a parameter tree.

In: parameters, tokens and positions. Out: hidden states, logits and a KV cache. `architecture` describes a model and
has the one table of its parameters; `transformer` is the forward pass of training, prefill, scoring and decoding;
`attention` chooses among the implementations for each platform. Knows no files, no text and no requests. May import
sharding, config and errors.
"""
