"""Every mesh of eight virtual devices trains, decodes and scores as one device does, by either table of rules."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from architectures import small
from letter_tokenizer import LetterTokenizer
from meshes import mesh_of

from isheep_jax.config import DecodeConfig, SFTConfig
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.model.architecture import init_parameters
from isheep_jax.sft import data
from isheep_jax.sft.train_step import TrainSetup, build_train_programs
from isheep_jax.sharding import decode_mesh, put

# Every size that is split divides by 8.
LLAMA = small(heads=8, kv_heads=8, head_dim=4)
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen2": dataclasses.replace(LLAMA, family="qwen2", heads=16, tied_embeddings=False),
    "gemma2": dataclasses.replace(
        LLAMA,
        family="gemma2",
        window=4,
        windowed_layers=(0,),
        query_scalar=8,
        attention_softcap=20.0,
        logit_softcap=10.0,
    ),
}
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
ROWS, LENGTH = 8, 24
SETTINGS = SFTConfig(
    lora_rank=4,
    lora_alpha=8.0,
    lora_dropout=0.3,
    weight_decay=0.0,
    # Never reached, so that the first moments tell the gradients.
    clip_norm=1e9,
    batch_size=ROWS,
    remat="none",
)
ONE = (1, 1, 1)


def spelled(value) -> str:
    """A parameter in the name of its test, such as 2x2x2."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def combinations(choices, quick) -> list:
    """Every combination of the choices; those that do not begin like one of `quick` only with -m slow."""
    return [
        pytest.param(
            *values,
            marks=() if any(values[: len(q)] == q for q in quick) else pytest.mark.slow,
            id="-".join(map(spelled, values)),
        )
        for values in itertools.product(*choices)
    ]


@functools.cache
def weights(family: str) -> dict:
    """Random on the host, with norms and biases that are not trivial, large enough that every token matters."""
    params = init_parameters(ARCHITECTURES[family], jax.random.key(0))
    draw = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.asarray(5 * leaf + 0.1 * draw.normal(size=leaf.shape), np.float32), params)


@functools.cache
def packed() -> data.Batch:
    """Rows that hold several examples each, the last of them empty in part."""
    draw = np.random.default_rng(2)
    columns = []
    for length in draw.integers(3, 12, size=22):
        tokens = draw.integers(2, LLAMA.vocab_size, size=length + 1)
        trained = np.arange(length) >= length // 2
        columns.append(np.stack([tokens[:-1], tokens[1:], trained], axis=1).astype(np.int32))
    (batch,) = data.batches(columns, sequence_length=LENGTH, batch_size=ROWS)
    return batch


def test_rows_of_these_tests_are_packed():
    assert packed().tokens.shape == (ROWS, LENGTH)
    assert sorted({int(row.max()) for row in packed().segment_ids})[-1] >= 3
    assert 0 < packed().loss_mask.sum() < (packed().segment_ids > 0).sum() < ROWS * LENGTH


@functools.cache
def learned(family: str, method: str, sizes: tuple[int, int, int]) -> tuple[dict, dict]:
    """An update's metrics, such as the loss, and its gradients by the names of their leaves."""
    settings = dataclasses.replace(SETTINGS, method=method)
    run = build_train_programs(TrainSetup.from_config(ARCHITECTURES[family], settings, mesh_of(sizes), "float32"))
    params = jax.device_put(weights(family), run.parameter_shardings)
    base = params if method == "lora" else {}
    state = run.init_state(params, np.uint32(3))
    if method == "lora":
        # Adapters begin with b = 0, where the gradient of a is 0 on every mesh.
        state = dataclasses.replace(
            state,
            weights=jax.tree.map(
                lambda w: w + jnp.float32(0.05) * jnp.cos(1 + jnp.arange(w.size).reshape(w.shape)), state.weights
            ),
        )
        state = jax.device_put(state, run.state_shardings)
    batch = put(packed(), run.batch_sharding)
    state, metrics = run.train_step(state, base, batch, np.float32(1e-3), np.uint32(1), np.uint32(3))
    moments = next(part.mu for part in state.optimizer if hasattr(part, "mu"))
    # Adam's first moment after the first update is 0.1 times the gradient.
    gradients = {jax.tree_util.keystr(path): 10 * np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(moments)}
    return jax.device_get(metrics), gradients


@pytest.mark.parametrize(
    ("family", "method", "sizes"),
    combinations(
        (ARCHITECTURES, ["full", "lora"], MESHES),
        quick=[("qwen2", "full"), ("llama", "lora", (2, 2, 2))],
    ),
)
def test_training_has_loss_and_gradients_of_one_device(family, method, sizes):
    expected_metrics, expected = learned(family, method, ONE)
    metrics, gradients = learned(family, method, sizes)
    assert metrics["tokens"] == packed().loss_mask.sum()
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-4, err_msg=name)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = np.abs(gradient).max()
        # The biases of keys move all attention logits of a query alike, which softmax does not see.
        assert largest > 1e-5 or "bk" in name, name
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-3, atol=1e-4 * largest + 1e-7, err_msg=name)


REQUESTS = [Request(f"r{i}", "thequickbrownfoxjumps"[: 1 + 2 * i]) for i in range(11)]


@functools.cache
def engine(family: str, tensor: int | None) -> Engine:
    """An engine on the decode mesh of eight devices, or (tensor None) on one device."""
    config = DecodeConfig(slots=8, steps_per_call=5, max_length=32)
    mesh = mesh_of() if tensor is None else decode_mesh(mesh_of((2, 2, 2)), tensor)
    return Engine(
        weights(family),
        ARCHITECTURES[family],
        LetterTokenizer(LLAMA.vocab_size),
        config,
        mesh=mesh,
        seed=0,
        compute_dtype="float32",
    )


@functools.cache
def written(family: str, tensor: int | None, temperature: float) -> dict[str, tuple[int, ...]]:
    sampling = SamplingParams(temperature=temperature, top_p=0.9, max_tokens=9)
    return {done.id: done.tokens for done in engine(family, tensor).generate(REQUESTS, sampling)}


@functools.cache
def choice_logprobs(family: str, tensor: int | None) -> dict[str, tuple[float, ...]]:
    return {
        result.id: result.logprobs
        for result in engine(family, tensor).choice_logprobs(REQUESTS, ["a", "b", "ab", "bca"])
    }


decoding = pytest.mark.parametrize(
    ("family", "tensor"),
    combinations((ARCHITECTURES, [1, 2, 4, 8]), quick=[("qwen2",)]),
)


@decoding
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decoding_samples_tokens_of_one_device(family, tensor, temperature):
    expected = written(family, None, temperature)
    assert len(set(expected.values())) > 5
    assert written(family, tensor, temperature) == expected


def test_temperature_samples_other_tokens_than_most_probable():
    assert written("qwen2", None, 1.0) != written("qwen2", None, 0.0)


@decoding
def test_choices_have_logprobs_of_one_device(family, tensor):
    expected = choice_logprobs(family, None)
    assert expected.keys() == {request.id for request in REQUESTS}
    assert np.std(list(expected.values())) > 0.5
    for name, logprobs in choice_logprobs(family, tensor).items():
        np.testing.assert_allclose(logprobs, expected[name], atol=1e-3, rtol=1e-4, err_msg=name)
