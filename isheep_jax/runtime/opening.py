"""Opens what `locate_model` finds: a model, or the adapter that a run stored in place of one, with its base."""

import re

from etils import epath

from isheep_jax.checkpoint.adapter_config import ADAPTER_CONFIG, is_adapter, read_base
from isheep_jax.checkpoint.pretrained import Pretrained, open_adapter, open_model
from isheep_jax.errors import UserError
from isheep_jax.loop import made_models
from isheep_jax.runtime.locate import locate_model

# A base that the same run made, relative to the run.
IN_RUN = re.compile(r"iteration_\d+/(\w+/)?(model|adapter)")


def open_located(directory: epath.Path, chat_template: str = "auto") -> Pretrained:
    """Opens a model directory, a GGUF file, or the adapter of a run together with its base.

    Raises `UserError` as `open_model`, also when the base of an adapter is not where the adapter says.
    """
    if not is_adapter(directory):
        return open_model(directory, chat_template)
    made_models.check(directory)
    return open_adapter(directory, open_located(locate_base(directory)), chat_template)


def locate_base(adapter: epath.Path) -> epath.Path:
    """Returns the model or adapter that an adapter belongs to. Raises `UserError` when it is not to be found."""
    base = read_base(adapter)
    if not IN_RUN.fullmatch(base):
        return locate_model(base, f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path", adapters=True)
    iteration = next((path for path in adapter.parents if re.fullmatch(r"iteration_\d+", path.name)), None)
    if iteration is None:
        raise UserError(
            f"{adapter / ADAPTER_CONFIG} names {base} of a run as its base, but it is in no run's directory"
        )
    return iteration.parent / base
