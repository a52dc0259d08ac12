"""Fine-tunes a model on given pairs, outside the loop: `isheep_jax.fine_tune`."""

from collections.abc import Callable, Iterable

import jax.numpy as jnp
from etils import epath

from isheep_jax.checkpoint.hf_weights import save_checkpoint
from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.config import MeshConfig, SFTConfig
from isheep_jax.runtime.backend import adapter_base
from isheep_jax.runtime.devices import default_dtype, use_compilation_cache
from isheep_jax.runtime.locate import locate_model
from isheep_jax.sft.examples import Example
from isheep_jax.sft.lora import save_adapter
from isheep_jax.sft.trainer import FineTuneResult, check_settings
from isheep_jax.sft.trainer import fine_tune as train
from isheep_jax.sharding import TRAIN_RULES, make_mesh
from isheep_jax.text.conversation import Message


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
    on_step: Callable[[int, int, dict[str, float]], None] | None = None,
) -> FineTuneResult:
    """Fine-tunes a model on pairs of instruction and response. The same call again resumes at the newest checkpoint.

    Args:
      model: what `load` takes.
      pairs: instruction and response of each pair. Only the response carries loss.
      directory: gets `model/` in Hugging Face format, with LoRA `adapter/` in PEFT format, and `checkpoints/`.
      sft: settings of the fine-tuning.
      mesh: layout of the devices.
      chat_template: "auto" (the tokenizer's own) or a name, as `model.chat_template`.
      compute_dtype: "float32", "bfloat16", or "auto" for float32 on CPUs and bfloat16 elsewhere.
      seed: of the order of the pairs, the adapters and dropout.
      on_step: is called with the number of updates, their total and the metrics of the last one.

    Raises `UserError` for a model or settings that do not fit.
    """
    use_compilation_cache()
    directory = epath.Path(directory)
    source = locate_model(model)
    pretrained = open_model(source, chat_template)
    pretrained.check_chat()
    devices = make_mesh(mesh)
    check_settings(sft, pretrained.architecture, devices)
    dtype = jnp.dtype(default_dtype() if compute_dtype == "auto" else compute_dtype)
    # LoRA keeps full precision in the adapters; full fine-tuning needs it in the weights.
    params = pretrained.load(mesh=devices, rules=TRAIN_RULES, dtype=jnp.float32 if sft.method == "full" else dtype)
    params, adapters, result = train(
        params,
        pretrained.architecture,
        pretrained.tokenizer,
        [Example(str(i), (Message("user", pair[0]),), pair[1]) for i, pair in enumerate(pairs)],
        sft,
        mesh=devices,
        directory=directory / "checkpoints",
        seed=seed,
        compute_dtype=dtype,
        on_step=on_step,
    )
    if adapters is not None:
        save_adapter(directory / "adapter", adapters, pretrained.architecture, sft, adapter_base(model, source))
    save_checkpoint(directory / "model", params, pretrained.architecture, pretrained.tokenizer, dtype=dtype, card=None)
    return result
