"""The command that measures how fast this hardware decodes for a config, next to what it could do at best.

python -m isheep_jax.benchmark decode --config=NAME
"""

import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import run_command
from isheep_jax.cli.options import ConfigOptions
from isheep_jax.cli.output import show
from isheep_jax.config import Config
from isheep_jax.files import check_output, write_json

if TYPE_CHECKING:
    import jax.numpy as jnp
    from jax.sharding import Mesh

    from isheep_jax.speed.quantization_error import QuantizationError

# New tokens of each seed task's instruction on which int8 is compared.
_COMPARED_TOKENS = 32


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions(ConfigOptions):
    """Options of the command."""

    measure: Literal["", "decode"] = ""
    """What to measure. 'decode': the decode engine."""
    workload: tuple[Literal["synthesize", "respond", "assess"], ...] = ("synthesize", "respond", "assess")
    """Lists of requests to decode, with the lengths of these stages of the loop."""
    requests: int = 256
    """Requests of each list (count)."""
    output: str = ""
    """JSON file to write the figures to, too."""
    random: bool = False
    """Random weights in the shapes of model.path, whose files then need not be here."""
    shape: Literal["", "llama_100m"] = ""
    """Random weights in these shapes in place of model.path. 'llama_100m': a Llama of 100 million parameters."""


COMMAND = Command(
    module="isheep_jax.benchmark",
    options=BenchmarkOptions,
    usage=(
        "decode --config=NAME [--workload=LIST] [--requests=N] [--output=FILE] [--random] [--shape=NAME] "
        "[--section.field=value ...]",
    ),
    about="Measures a copy and the products at the model's shapes, then the decode engine on lists of requests with "
    "the lengths of the loop's stages. Prints requests and tokens per second, how full the slots were, how long the "
    "devices waited for the host, and the share of the least time that the measured ceilings allow. Where "
    "decode.weights_dtype or decode.kv_cache_dtype is int8, also what that changes in the model's predictions.",
    example="decode --config=tiny",
    positional=("measure",),
    required=("measure",),
    ranges={"requests": "[1, 1000000]"},
)


def main(arguments: Sequence[str]) -> None:
    """Measures. Raises `UserError` for bad input."""
    options = COMMAND.parse(arguments)
    config = options.settings
    output = check_output("--output", options.output) if options.output else None

    import jax
    import jax.numpy as jnp

    from isheep_jax.decode.engine import Engine
    from isheep_jax.model.architecture import parameter_table
    from isheep_jax.runtime.devices import describe_devices, use_compilation_cache
    from isheep_jax.sharding import DECODE_RULES, check_divisible, decode_mesh, make_mesh
    from isheep_jax.speed import decoding, report
    from isheep_jax.speed.ceilings import measure_ceilings
    from isheep_jax.speed.workloads import WORKLOADS, IdTokenizer

    use_compilation_cache()
    mesh = decode_mesh(make_mesh(config.mesh), config.mesh.decode_tensor)
    model = _Model(config, options.random, options.shape)
    check_divisible(parameter_table(model.architecture), mesh, DECODE_RULES)
    dtype = jnp.dtype(config.model.compute_dtype)
    params = model.parameters(mesh, dtype)
    quantization_error = None
    if "int8" in (config.decode.weights_dtype, config.decode.kv_cache_dtype):
        quantization_error = model.quantization_error(params, mesh, dtype)
    ceilings = measure_ceilings(model.architecture, mesh, dtype)
    # This tokenizer has no eos, so that completions have the requested lengths.
    tokenizer = IdTokenizer(model.architecture.vocab_size)
    engine = Engine(
        params, model.architecture, tokenizer, config.decode, mesh=mesh, seed=config.seed, compute_dtype=dtype
    )
    del params
    figures = report.Report(describe_devices(jax.devices()), model.name, dtype.name, ceilings, quantization_error)
    show("\n".join(figures.opening()))
    for name in options.workload:
        workload = WORKLOADS[name](options.requests, config.seed).within(engine.config.max_length)
        figures.speeds.append(decoding.measure_speed(engine, workload, ceilings))
        show(figures.row(figures.speeds[-1]))
    if output:
        write_json(output, figures.as_dict())


class _Model:
    """The config's model from its files, or random weights in its shapes or in those of `speed.shapes.SHAPES`."""

    def __init__(self, config: Config, random: bool = False, shape: str = ""):
        from isheep_jax.checkpoint.pretrained import open_model
        from isheep_jax.planning.models import planned_architecture
        from isheep_jax.runtime.locate import locate_model
        from isheep_jax.speed.shapes import SHAPES

        self.name = shape or config.model.path
        self.config, self.pretrained = config, None
        if shape:
            self.architecture = SHAPES[shape]
        elif random:
            with tempfile.TemporaryDirectory() as work:
                self.architecture = planned_architecture(config.model.path, Path(work))
        else:
            self.pretrained = open_model(locate_model(config.model.path, "--model.path"), config.model.chat_template)
            self.architecture = self.pretrained.architecture

    def parameters(self, mesh: "Mesh", dtype: "jnp.dtype") -> dict[str, Any]:
        """Returns the weights, laid out for decoding."""
        from isheep_jax.sharding import DECODE_RULES

        if self.pretrained is not None:
            return self.pretrained.load(mesh=mesh, rules=DECODE_RULES, dtype=dtype)
        import jax

        from isheep_jax.model.architecture import init_parameters, parameter_table
        from isheep_jax.sharding import param_shardings

        shardings = param_shardings(parameter_table(self.architecture), mesh, DECODE_RULES)
        init = jax.jit(init_parameters, static_argnums=(0, 2), out_shardings=shardings)
        return init(self.architecture, jax.random.key(self.config.seed), dtype)

    def quantization_error(
        self, params: dict[str, Any], mesh: "Mesh", dtype: "jnp.dtype"
    ) -> "QuantizationError | None":
        """Returns what int8 changes on the model's continuations of the seed tasks; None for random weights."""
        if self.pretrained is None:
            return None
        from isheep_jax.loop.prompting.seeds import read_seeds
        from isheep_jax.loop.prompting.templates import load
        from isheep_jax.speed.quantization_error import measure_quantization_error

        templates = load(self.config.prompts, ("synthesize",))
        seeds = read_seeds(templates.seeds_file(self.config.synthesize.seeds), 1)
        prompts = [seed.instruction + "\n" for seed in seeds]
        return measure_quantization_error(
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


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
