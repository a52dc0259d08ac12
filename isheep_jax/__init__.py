"""Iterative self-alignment of language models, native to JAX.

The commands are the modules `train`, `generate`, `export`, `plan`, `benchmark` and `study`. From Python, the names of
`__all__` load a model, fine-tune one and run the loop; `docs/library.md` shows how. They are imported when first used,
because they bring in jax.
"""

import importlib
import logging

__version__ = "0.1.0"

_HOMES = {
    "load": "isheep_jax.runtime.load",
    "fine_tune": "isheep_jax.runtime.fine_tune",
    "run": "isheep_jax.runtime.run",
    "Request": "isheep_jax.decode.requests",
    "SamplingParams": "isheep_jax.decode.requests",
    "Message": "isheep_jax.text.conversation",
    "Config": "isheep_jax.config",
    "DecodeConfig": "isheep_jax.config",
    "MeshConfig": "isheep_jax.config",
    "SFTConfig": "isheep_jax.config",
    "named_config": "isheep_jax.named_configs",
    "replace_settings": "isheep_jax.presets",
    "UserError": "isheep_jax.errors",
}
__all__ = sorted(_HOMES)

# A library is silent unless the program that uses it configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str):
    """Imports a public name from its module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
