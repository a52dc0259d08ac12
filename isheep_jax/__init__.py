"""Iterative self-alignment of language models, native to JAX and TPU pods."""

__version__ = "0.1.0"
