"""What is lowered ahead is what the engine calls: nothing that was compiled ahead is compiled again."""

from accelerator_sizes import accelerator_sizes
from meshes import mesh_of
from minute_model import make_engine

from isheep_jax.decode.lowering import DecodingPrograms
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.runtime.compilations import compilations

# The programs that take long to compile for large models.
LARGE = {
    f"jit({name})"
    for name in (
        *("decode_steps", "prefill", "make_prefix", "allocate_cache"),
        *("packed_logprobs", "second_logprobs", "token_logprobs", "segment_means"),
    )
}
LENGTH, PREFIX = 96, "fghij" * 8
CHOICES = [" a", "||10"]


def test_an_engine_compiles_nothing_that_was_compiled_ahead(monkeypatch, params):
    accelerator_sizes(monkeypatch, row=128)
    # Steps per call of no other test.
    engine = make_engine(params, mesh=mesh_of((2, 1, 2)), max_length=LENGTH, slots=8, steps_per_call=7)
    programs = DecodingPrograms(engine.model.nominal_shape, LENGTH)
    shared = len(engine.model.tokenize(Request("", PREFIX + "a", PREFIX)).prefix)
    assert shared > 32
    before = compilations()
    for listed in (
        programs.generate(shared, 8),
        programs.choices(shared, len(CHOICES), long=True),
        programs.texts(0),
        programs.embed(),
    ):
        for program in listed:
            program.compile()
    ahead = compilations() - before
    assert (ahead.compiled + ahead.cached).keys() >= LARGE

    before = compilations()
    plain = [Request(f"{i}", "bcd"[: 1 + i % 3] * (1 + i)) for i in range(20)]
    requests = [Request(request.id, PREFIX + request.prompt, PREFIX) for request in plain]
    results = [
        *engine.generate(requests, SamplingParams(max_tokens=8)),
        *engine.choice_logprobs(requests, CHOICES),
        *engine.text_logprobs(plain, ["xyz" * (1 + i % 2) for i in range(20)]),
        *engine.embed(plain),
    ]
    assert not any(result.error for result in results)
    new = compilations() - before
    assert not LARGE & (new.compiled + new.cached).keys()
