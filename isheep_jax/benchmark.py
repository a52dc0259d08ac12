"""How fast the hardware at hand runs a config's decoding, beside what it could do at best.

python -m isheep_jax.benchmark decode --config=NAME
"""

import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from isheep_jax.cli.arguments import parse_config, run_command
from isheep_jax.config import Config
from isheep_jax.errors import UserError

MODULE = "isheep_jax.benchmark"
USAGE = """python -m isheep_jax.benchmark decode --config=NAME [--workload=LIST] [--requests=N] [--output=FILE]
    [--random] [--section.field=value ...]

Measures a copy and the products at the model's shapes, then the decode engine on lists of requests with the lengths of
the loop's stages: synthesize, respond, assess. Prints requests and tokens per second, how full the slots were, how long
the devices waited for the host, and the share of the least time that the measured ceilings allow. Where
decode.weights_dtype or decode.kv_cache_dtype is int8, also what that changes in the model's predictions.

--workload=LIST  some of synthesize,respond,assess; with commas (default: all)
--requests=N     requests of each list (default: 256)
--output=FILE    write the figures as JSON too
--random         random weights: of a model that is not here, only its shapes count.
                 --model.path=llama_100m is a small Llama that needs no files
"""
# New tokens of each seed task's instruction on which int8 is compared.
_COMPARED_TOKENS = 32


def main(arguments: Sequence[str]) -> None:
    """Measures. Raises `UserError` for bad input."""
    if any(a in ("-h", "--help") for a in arguments):
        print(USAGE)
        parse_config(["--help"], MODULE)  # and exits
    options, rest = _own_options(arguments)
    if rest[:1] != ["decode"]:
        raise UserError("say what to measure: python -m isheep_jax.benchmark decode --config=NAME")
    _decode(parse_config(rest[1:], MODULE), options)


def _decode(config: Config, options: "_Options") -> None:
    from isheep_jax.speed.workloads import WORKLOADS

    for name in options.workloads or ():
        if name not in WORKLOADS:
            raise UserError(f"--workload: {name} is not one of {', '.join(WORKLOADS)}")
    if options.output and not options.output.parent.is_dir():
        raise UserError(f"--output: there is no directory {options.output.parent}")

    import jax
    import jax.numpy as jnp

    from isheep_jax.decode.engine import Engine
    from isheep_jax.model.architecture import parameter_table
    from isheep_jax.runtime.devices import describe_devices, use_compilation_cache
    from isheep_jax.sharding import DECODE_RULES, check_divisible, decode_mesh, make_mesh
    from isheep_jax.speed import decoding, report
    from isheep_jax.speed.ceilings import measure_ceilings
    from isheep_jax.speed.workloads import IdTokenizer

    use_compilation_cache()
    mesh = decode_mesh(make_mesh(config.mesh), config.mesh.decode_tensor)
    model = _Model(config, options.random)
    check_divisible(parameter_table(model.architecture), mesh, DECODE_RULES)
    dtype = jnp.dtype(config.model.compute_dtype)
    params = model.parameters(mesh, dtype)
    quality = None
    if "int8" in (config.decode.weights_dtype, config.decode.kv_cache_dtype):
        quality = model.quality(params, mesh, dtype)
    ceilings = measure_ceilings(model.architecture, mesh, dtype)
    # No token ends a completion, so that lengths are as asked for.
    architecture = dataclasses.replace(model.architecture, eos_token_ids=())
    tokenizer = IdTokenizer(architecture.vocab_size)
    engine = Engine(params, architecture, tokenizer, config.decode, mesh=mesh, seed=config.seed, compute_dtype=dtype)
    del params
    found = report.Report(describe_devices(jax.devices()), config.model.path, dtype.name, ceilings, quality)
    print("\n".join(found.opening()), flush=True)
    for name in options.workloads or WORKLOADS:
        workload = WORKLOADS[name](options.requests, config.seed).within(engine.config.max_length)
        found.speeds.append(decoding.measure_speed(engine, workload, ceilings))
        print("\n".join(found.lines(found.speeds[-1])), flush=True)
    if options.output:
        options.output.write_text(json.dumps(found.as_dict(), indent=2) + "\n")


class _Model:
    """The config's model, from its files or with random weights."""

    def __init__(self, config: Config, random: bool):
        from isheep_jax.checkpoint.pretrained import open_model
        from isheep_jax.planning.models import planned_architecture
        from isheep_jax.runtime.locate import locate_model
        from isheep_jax.speed.workloads import LLAMA_100M

        self.config, self.pretrained = config, None
        if config.model.path == "llama_100m":
            self.architecture = LLAMA_100M
        elif random:
            with tempfile.TemporaryDirectory() as work:
                self.architecture = planned_architecture(config.model.path, Path(work))
        else:
            self.pretrained = open_model(locate_model(config.model.path, "--model.path"), config.model.chat_template)
            self.architecture = self.pretrained.architecture

    def parameters(self, mesh, dtype) -> dict:
        from isheep_jax.sharding import DECODE_RULES

        if self.pretrained is not None:
            return self.pretrained.load(mesh=mesh, rules=DECODE_RULES, dtype=dtype)
        import jax

        from isheep_jax.model.architecture import init_parameters, parameter_table
        from isheep_jax.sharding import param_shardings

        where = param_shardings(parameter_table(self.architecture), mesh, DECODE_RULES)
        draw = jax.jit(init_parameters, static_argnums=(0, 2), out_shardings=where)
        return draw(self.architecture, jax.random.key(self.config.seed), dtype)

    def quality(self, params, mesh, dtype):
        """What int8 changes on the model's continuations of the seed tasks; None for random weights."""
        if self.pretrained is None:
            return None
        from isheep_jax.loop.prompting.seeds import read_seeds
        from isheep_jax.loop.prompting.templates import load
        from isheep_jax.speed.quantization_error import measure_quality

        templates = load(self.config.prompts, ("synthesize",))
        seeds = read_seeds(templates.seeds_file(self.config.synthesize.seeds), 1)
        prompts = [seed.instruction + "\n" for seed in seeds]
        return measure_quality(
            params,
            self.architecture,
            self.pretrained.tokenizer,
            self.config.decode,
            prompts,
            mesh=mesh,
            seed=self.config.seed,
            compute_dtype=dtype,
            max_tokens=_COMPARED_TOKENS,
        )


@dataclasses.dataclass
class _Options:
    """The command's own options."""

    workloads: tuple[str, ...] | None = None
    requests: int = 256
    output: Path | None = None
    random: bool = False


def _own_options(arguments: Sequence[str]) -> tuple[_Options, list[str]]:
    """The command's own options, and the arguments that are the config's."""
    options, rest = _Options(), []
    words = iter(arguments)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--random":
            options.random = True
            continue
        if name not in ("--workload", "--requests", "--output"):
            rest.append(word)
            continue
        value = value if equals else next(words, "")
        if not value:
            raise UserError(f"{name} needs a value: see --help")
        if name == "--workload":
            options.workloads = tuple(value.split(","))
        elif name == "--output":
            options.output = Path(value)
        elif not value.isdigit() or int(value) < 1:
            raise UserError(f"--requests: {value!r} is not a number of requests from 1 upward")
        else:
            options.requests = int(value)
    return options, rest


if __name__ == "__main__":
    sys.exit(run_command(main, MODULE))
