"""Peak memory of importing a checkpoint of two billion parameters in bfloat16 on eight virtual devices.

python tests/benchmarks/import_memory.py [--directory=...]     (4 GB of disk)

The checkpoint is made on the spot; a fresh process loads it, once per set of rules. The bound: its own size, which the
devices' memory takes on a CPU, plus 2 GiB.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

GIB = 2**30
# The shape of Qwen1.5-1.8B, a little wider: 2.1 billion parameters.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6912,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "eos_token_id": 151643,
}


def make(directory: Path) -> None:
    import numpy as np

    from isheep_jax.checkpoint.hf_config import read_architecture
    from isheep_jax.checkpoint.safetensors_file import DTYPES, write_file
    from isheep_jax.model.architecture import leaves, parameter_table

    (directory / "config.json").write_text(json.dumps(CONFIG))
    shapes = {}
    for _, spec in leaves(parameter_table(read_architecture(directory))):
        for layer in range(spec.shape[0] if spec.stacked else 1):
            shapes[spec.hf_name.format(layer=layer)] = spec.hf_shape
    draw = np.random.default_rng(0)
    names = sorted(shapes)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in files.items():
        values = (draw.standard_normal(shapes[n], np.float32).astype(DTYPES["BF16"]) for n in held)
        write_file(directory / file, {n: shapes[n] for n in held}, DTYPES["BF16"], values)
    weight_map = {name: file for file, held in files.items() for name in held}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def peak_memory() -> int:
    """Memory of this process, in bytes. getrusage would count the parent's, too."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def load(directory: Path, rules: str) -> None:
    import jax
    import jax.numpy as jnp

    from isheep_jax import sharding
    from isheep_jax.checkpoint.hf_config import read_architecture
    from isheep_jax.checkpoint.hf_weights import load_parameters
    from isheep_jax.config import MeshConfig

    architecture = read_architecture(directory)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    table = sharding.TRAIN_RULES
    if rules == "decode":
        mesh, table = sharding.decode_mesh(mesh, 8), sharding.DECODE_RULES
    jax.block_until_ready(jnp.zeros(()))
    before = peak_memory()
    params = load_parameters(directory, architecture, mesh=mesh, rules=table, dtype=jnp.bfloat16)
    peak = peak_memory()
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    verdict = "within" if peak < size + 2 * GIB else "ABOVE"
    print(
        f"{rules} rules: checkpoint {size / GIB:.2f} GiB, peak resident memory {peak / GIB:.2f} GiB "
        f"({before / GIB:.2f} before loading): {verdict} its size + 2 GiB"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--rules")
    options = parser.parse_args()
    if options.rules:
        load(options.directory, options.rules)
        return
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        make(Path(directory))
        for rules in ("train", "decode"):
            command = [sys.executable, __file__, f"--directory={directory}", f"--rules={rules}"]
            subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
