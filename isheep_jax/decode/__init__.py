"""Decoding: prompts in, completions, log-probabilities and embeddings out, for one set of weights (`engine.Engine`).

The life of a request:

1. `tokenization` encodes it, splits off a prefix that it shares with other requests, and checks that it fits.
2. `queue` holds it until `scheduler` (continuous batching) has an idle slot for it: one of the sequences that are
   decoded at the same time. `device_calls` are what the scheduler asks of the devices.
3. `packing` puts its prompt into a row with others, and `prefill` writes its keys and values to the slot's cache row.
4. `programs` runs several decode steps of all slots in one device call, and `sampling` picks each next token.
5. `slots` takes in the new tokens; `stops` looks for stop strings. A finished request leaves its slot to the next.

Scoring needs no slots: `choice_logprobs` and `text_logprobs` read everything from prefilled rows (`prefill_logprobs`).
`loaded` holds what all of them share: the weights, the tokenizer, the settings. `requests` has the inputs and outputs.

May import errors, config, config_checks, sharding, text and model. Never sft or loop.
"""
