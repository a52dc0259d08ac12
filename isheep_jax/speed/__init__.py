"""Measures decoding speed for the benchmark command: workloads, the machine's ceilings, the engine against them.

In: a loaded engine, lists of requests with the lengths of the loop's stages (`workloads`), and what the hardware does
at best (`ceilings`). Out: requests and tokens per second, and the share of the least time that they reach (`decoding`),
what int8 changes in the predictions (`quantization_error`), and both as a table and as JSON (`report`). `shapes` are
models without files. May import every room below it except the studies; only `benchmark` imports it.
"""
