"""End-of-sequence tokens that the JSON files of a model directory name; `Tokenizer.eos_ids` adds its own."""

from etils import epath

from isheep_jax.errors import UserError, quoted
from isheep_jax.text.json_files import has_file, read_json_object


def configured_eos_ids(directory: epath.Path) -> tuple[int, ...]:
    """Returns the ids of `eos_token_id` in config.json and generation_config.json, without duplicates.

    Raises `UserError`, naming the file, when a value is neither a token id nor a list of token ids.
    """
    ids: dict[int, None] = {}
    for name in ("config.json", "generation_config.json"):
        path = directory / name
        value = read_json_object(path).get("eos_token_id") if has_file(path) else None
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in values):
            raise UserError(
                f"{path}: eos_token_id is {quoted(repr(value))}; it must be a token id or a list of token ids"
            )
        ids |= dict.fromkeys(values)
    return tuple(ids)
