"""Opens what `locate_model` finds: a model, or the adapter that a run stored in place of one, with its base."""

import re

from etils import epath

from isheep_jax.checkpoint.adapter_config import ADAPTER_CONFIG, is_adapter, read_base
from isheep_jax.checkpoint.pretrained import Pretrained, model_files, open_adapter, open_model
from isheep_jax.errors import UserError
from isheep_jax.loop import made_models, run_directory
from isheep_jax.runtime.locate import locate_model

# A base that the same run made, relative to the run.
IN_RUN = re.compile(r"iteration_\d+/(\w+/)?(model|adapter)")


def open_located(directory: epath.Path, chat_template: str = "auto") -> Pretrained:
    """Opens a model directory, a GGUF file, or the adapter of a run together with its base.

    Raises `UserError` as `open_model`, also when the base of an adapter is not where the adapter says.
    """
    adapters: list[epath.Path] = []
    while True:
        # Before it is asked what it is: an adapter may have lost the file that says so.
        made_models.check(directory)
        if not is_adapter(directory):
            break
        if directory in adapters:
            raise UserError(f"{directory / ADAPTER_CONFIG}: base_model_name_or_path leads back to the adapter itself")
        adapters.append(directory)
        directory = locate_base(directory)
    model = open_model(directory, "auto" if adapters else chat_template)
    for adapter in reversed(adapters):
        model = open_adapter(adapter, model, chat_template if adapter == adapters[0] else "auto")
    return model


def locate_base(adapter: epath.Path) -> epath.Path:
    """Returns the model or adapter that an adapter belongs to.

    Raises `UserError` when it is not to be found, or is not what the adapter's run began with any more.
    """
    base = read_base(adapter)
    iteration = next((path for path in adapter.parents if re.fullmatch(r"iteration_\d+", path.name)), None)
    if not IN_RUN.fullmatch(base):
        found = locate_model(base, f"{adapter / ADAPTER_CONFIG}: base_model_name_or_path", adapters=True)
        if iteration is not None:
            run_directory.check_base(iteration.parent, model_files(found))
        return found
    if iteration is None:
        raise UserError(
            f"{adapter / ADAPTER_CONFIG} names {base} of a run as its base, but it is in no run's directory"
        )
    return iteration.parent / base
