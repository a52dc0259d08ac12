"""Fine-tunes a model and saves it, for the loop's backend and for `isheep_jax.fine_tune`."""

from collections.abc import Iterable

import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from isheep_jax.checkpoint.adapters import save_adapter
from isheep_jax.checkpoint.hf_save import save_checkpoint
from isheep_jax.checkpoint.pretrained import Pretrained, open_model
from isheep_jax.config import MeshConfig, SFTConfig
from isheep_jax.directory_lock import owned
from isheep_jax.files import full_path
from isheep_jax.loop import made_models
from isheep_jax.loop.protocols import FineTuneJob
from isheep_jax.runtime.devices import default_dtype, use_compilation_cache
from isheep_jax.runtime.locate import locate_model
from isheep_jax.sft.examples import Example
from isheep_jax.sft.trainer import FineTuneResult, OnStep, check_settings
from isheep_jax.sft.trainer import fine_tune as train
from isheep_jax.sharding import TRAIN_RULES, make_mesh
from isheep_jax.text.conversation import Message
from isheep_jax.tiny import EMBEDDED


def fine_tune(
    model: str,
    pairs: Iterable[tuple[str, str]],
    directory: epath.PathLike,
    *,
    sft: SFTConfig = SFTConfig(),  # noqa: B008 (frozen)
    mesh: MeshConfig = MeshConfig(),  # noqa: B008 (frozen)
    chat_template: str = "auto",
    compute_dtype: str = "auto",
    seed: int = 0,
    on_step: OnStep | None = None,
) -> FineTuneResult:
    """Fine-tunes a model on pairs of instruction and response.

    An interrupted call resumes at its newest checkpoint when it is made again; a finished one is refused.

    Args:
        model: What `load` takes.
        pairs: Instruction and response of each pair. Only the response carries loss.
        directory: Gets `model/` in Hugging Face format (not with sft.save="adapter"), with LoRA `adapter/` in PEFT
            format, and `checkpoints/`.
        sft: Settings of the fine-tuning.
        mesh: Layout of the devices.
        chat_template: "auto" (the tokenizer's own) or a name, as `model.chat_template`.
        compute_dtype: "float32", "bfloat16", or "auto" for float32 on CPUs and bfloat16 elsewhere.
        seed: Seeds the order of the pairs, the adapters and dropout.
        on_step: Called with the number of updates, their total and the metrics of the last update.

    Raises `UserError` for a model or settings that do not fit.
    """
    use_compilation_cache()
    pretrained = open_model(locate_model(model), chat_template)
    pretrained.check_chat()
    if sft.method == "lora":
        pretrained.check_adapters()
    devices = make_mesh(mesh)
    check_settings(sft, pretrained.architecture, devices)
    dtype = jnp.dtype(default_dtype() if compute_dtype == "auto" else compute_dtype)
    examples = [Example(str(i), (Message("user", pair[0]),), pair[1]) for i, pair in enumerate(pairs)]
    job = FineTuneJob(iteration=1, start=None, examples=examples, directory=epath.Path(directory), card=None)
    base = adapter_base(model, pretrained.directory)
    with owned("directory", job.directory):
        return train_and_save(pretrained, job, sft, mesh=devices, dtype=dtype, seed=seed, base=base, on_step=on_step)


def train_and_save(
    model: Pretrained,
    job: FineTuneJob,
    sft: SFTConfig,
    *,
    mesh: Mesh,
    dtype: jnp.dtype,
    seed: int,
    base: str,
    on_step: OnStep | None,
) -> FineTuneResult:
    """Fine-tunes a model on the examples of a job, and writes the new model, its adapter, or both; see `sft.save`.

    Args:
        model: Where to start, with the architecture and the tokenizer of the result.
        job: The examples, and the directory for checkpoints, adapter and model.
        sft: Settings of the fine-tuning.
        mesh: The training mesh.
        dtype: Dtype of the computation and of the saved weights.
        seed: Seeds the order of the examples, the adapters and dropout.
        base: Name of the model in the adapter's config.
        on_step: See `fine_tune`.
    """
    # LoRA keeps full precision in the adapters; full fine-tuning needs it in the weights.
    params = model.load(mesh=mesh, rules=TRAIN_RULES, dtype=jnp.float32 if sft.method == "full" else dtype)
    merged, adapters, result = train(
        params,
        model.architecture,
        model.tokenizer,
        job.examples,
        sft,
        mesh=mesh,
        directory=job.checkpoints,
        seed=seed,
        compute_dtype=dtype,
        on_step=on_step,
    )
    if adapters is not None:
        digests = save_adapter(
            job.adapter,
            adapters,
            model.architecture,
            sft,
            base,
            dtype=dtype,
            tokenizer=model.tokenizer,
            card=job.card if merged is None else None,
        )
        made_models.note_digests(job.adapter, digests)
    if merged is not None:
        digests = save_checkpoint(job.model, merged, model.architecture, model.tokenizer, dtype=dtype, card=job.card)
        made_models.note_digests(job.model, digests)
    return result


def adapter_base(path: str, directory: epath.Path) -> str:
    """Returns the name by which other tools find the base model `path` in `directory`: its full path, or its hub id."""
    if path not in EMBEDDED and not epath.Path(path).expanduser().exists():
        return path
    return str(full_path(directory))
