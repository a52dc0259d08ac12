"""Compiles the programs of a config for H100s that this machine does not have, and prints a JSON line for each.

    JAX_PLATFORMS=cpu python tests/gpu/compile_for_h100.py CONFIG [PROGRAM ...]

XLA's compiler for GPUs, which the extra gpu installs, needs no GPU if it is told what it compiles for. It then tries no
kernels out, so that the choice of kernels, and cuDNN's consent to its calls, remain to be seen.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax._src.lib import _jax, xla_client


def h100s(count: int) -> list[Any]:
    """Returns descriptions of H100s, to compile for."""
    jax.devices()  # loads the plugins
    xla_client.initialize_pjrt_plugin("cuda")
    target = Path(__file__).with_name("h100.txtpb").read_text()
    options = {"target_config": target, "topology": f"1x1x{count}"}
    return _jax.get_default_c_api_topology("cuda", options["topology"], options)._make_compile_only_devices()


def main(config_name: str, *names: str) -> None:
    from isheep_jax.named_configs import named_config
    from isheep_jax.planning import programs
    from isheep_jax.planning.models import planned_architecture

    config = named_config(config_name)
    with tempfile.TemporaryDirectory() as work:
        architecture = planned_architecture(config.model.path, Path(work))
    meshes = programs.make_meshes(config, architecture, h100s(1))
    for name in names or programs.NAMES:
        program = programs.make_program(name, config, architecture, meshes)
        compiled = program.compile() if program.compile else program.lower().compile()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        facts = {
            "program": name,
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "cudnn_calls": text.count('custom_call_target="__cudnn$fmha'),
            "triton_calls": text.count('custom_call_target="__gpu$xla.gpu.triton'),
            "loops": text.count(" while("),
        }
        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
