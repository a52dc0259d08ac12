"""Shapes of models that the benchmark gives random weights, so that it measures without any model's files."""

from isheep_jax.model.architecture import Architecture

SHAPES: dict[str, Architecture] = {
    # 100,092,672 parameters; the speeds of the engine and of its peers are compared on it.
    "llama_100m": Architecture(
        family="llama",
        vocab_size=32_000,
        hidden_size=768,
        intermediate_size=2048,
        layers=12,
        heads=12,
        kv_heads=4,
        head_dim=64,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        context_length=2048,
        tied_embeddings=True,
        bos_token_id=None,
        eos_token_ids=(),
    ),
}
