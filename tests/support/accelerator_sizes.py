"""The sizes of an accelerator's arrays on a CPU: few programs, whatever the prompts."""

from isheep_jax.decode import cache


def accelerator_sizes(monkeypatch, row: int) -> None:
    """Lets engines take sizes as on a GPU, with packed rows of one length (tokens)."""
    monkeypatch.setattr(cache.Sizing, "of", classmethod(lambda cls, mesh: cls("gpu", cache.data_shards(mesh))))
    monkeypatch.setattr(cache, "ROW_TOKENS", row)
    monkeypatch.setattr(cache, "_LONG_ROW_TOKENS", row)
