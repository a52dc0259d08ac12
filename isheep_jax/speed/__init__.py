"""Measures decoding speed for the benchmark command: workloads, the machine's ceilings, the engine against them.

In: a loaded engine, lists of requests with the lengths of the loop's stages (`workloads`), and what the hardware does
at best (`ceilings`). Out: requests and tokens per second as a share of the least time (`decoding`), what int8 changes
in the predictions (`quantization_error`), and both as a table and as JSON (`report`).
May import: decode, model, planning, text, config, errors, sharding. Only `benchmark` imports it.
"""
