"""Prompts in, completions out, from any checkpoint; or a conversation.

python -m isheep_jax.generate --model runs/tiny --prompt "..."
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from etils import epath

from isheep_jax.cli.arguments import parse_settings, run_command
from isheep_jax.config import ChatTemplate, DecodeConfig, MeshConfig
from isheep_jax.config_checks import check_range
from isheep_jax.errors import UserError
from isheep_jax.files import write_atomically
from isheep_jax.runtime.locate import locate_model

if TYPE_CHECKING:
    from isheep_jax.checkpoint.pretrained import Pretrained
    from isheep_jax.decode.engine import Engine
    from isheep_jax.decode.requests import Completion, SamplingParams

MODULE = "isheep_jax.generate"
DESCRIPTION = (
    f'python -m {MODULE} --model DIRECTORY --prompt "..."\n'
    f"python -m {MODULE} --model DIRECTORY --input prompts.jsonl --output out.jsonl\n"
    f"python -m {MODULE} --model DIRECTORY --chat\n\n"
    "Prints the completion and nothing else, completes a file of prompts, or holds a conversation."
)
# Decode steps between two pieces of an answer in a conversation.
_CHAT_CHUNK = 8


@dataclass(frozen=True)
class GenerateConfig:
    """One call of the command."""

    model: str = ""
    """Model directory in Hugging Face format (local or gs://), a run's directory (its newest model), a hub id (org/name
    or org/name@revision), or 'tiny' (the embedded base)."""
    prompt: str = ""
    """Text to answer."""
    input: str = ""
    """JSON Lines file of prompts: each line has the field prompt, or instruction and input."""
    output: str = ""
    """JSON Lines file to write: the lines of input with the fields completion and finish_reason. Empty: print them."""
    chat: bool = False
    """Hold a conversation in the terminal: /reset starts a new one, /quit leaves."""
    raw: bool = False
    """Continue the bare text. Otherwise the prompt becomes a user's turn, if the model has a chat template."""
    chat_template: ChatTemplate = "auto"
    """Chat template. 'auto': the tokenizer's own."""
    temperature: float = 0.0
    """Sampling temperature; 0 takes the most probable token."""
    top_p: float = 1.0
    """Sampling keeps the most probable tokens up to this share of the probability (0 to 1)."""
    top_k: int = 0
    """Sampling keeps so many of the most probable tokens (count; 0: all)."""
    min_p: float = 0.0
    """Sampling keeps tokens at least so probable, relative to the most probable one (0 to 1)."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that prompt or completion hold already (1: none)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens that the completion holds already (0: none)."""
    max_tokens: int = 256
    """New tokens per completion (count)."""
    stop: tuple[str, ...] = ()
    """Strings that end a completion; they are cut off."""
    seed: int = 0
    """Seed of the random numbers: the same seed and prompts give the same completions."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of weights and activations. 'auto': float32 on CPUs, bfloat16 elsewhere."""
    slots: int = 64
    """Prompts decoded at the same time (count, over all devices)."""
    context: int = 2048
    """Longest prompt plus completion (tokens), at most the model's own."""
    decode_tensor: int = 1
    """Shards of heads and feed-forward units (count); the other devices hold replicas of the weights."""


RANGES = {
    "temperature": "[0, inf)",
    "top_p": "(0, 1]",
    "top_k": "[0, inf)",
    "min_p": "[0, 1]",
    "repetition_penalty": "(0, inf)",
    "presence_penalty": "(-inf, inf)",
    "max_tokens": "[1, inf)",
    "slots": "[1, inf)",
    "context": "[2, inf)",
}


def main(arguments: Sequence[str]) -> None:
    """Completes one prompt or a file of prompts. Raises `UserError` for bad input or a prompt that does not fit."""
    config = parse_settings(GenerateConfig, GenerateConfig(), arguments, MODULE, DESCRIPTION)
    for name, interval in RANGES.items():
        check_range(name, getattr(config, name), interval)
    if not config.model:
        raise UserError(f'--model is missing; for example: python -m {MODULE} --model runs/tiny --prompt "..."')
    if bool(config.prompt) + bool(config.input) + config.chat != 1:
        raise UserError("give either --prompt, a text, or --input, a JSON Lines file of prompts, or --chat")
    if config.raw and config.chat:
        raise UserError("--raw: a conversation needs the chat template; leave out --raw or --chat")
    if config.output and not config.input:
        raise UserError("--output: it holds the lines of --input with their completions; give --input too")
    directory = locate_model(config.model)
    if config.chat:
        converse(config, directory)
        return
    records = read_prompts(Path(config.input)) if config.input else [{"prompt": config.prompt}]
    if config.output and not Path(config.output).parent.is_dir():
        raise UserError(f"--output: there is no directory {Path(config.output).parent}")

    completions = complete(config, directory, [text_of(record) for record in records])

    if config.input:
        answers = [
            {"completion": c.text, "finish_reason": c.finish_reason} | ({"error": c.error} if c.error else {})
            for c in completions
        ]
        text = "".join(json.dumps(r | a, ensure_ascii=False) + "\n" for r, a in zip(records, answers, strict=True))
        if config.output:
            write_atomically(Path(config.output), text.encode())
        else:
            sys.stdout.write(text)
    elif completions[0].finish_reason == "error":
        raise UserError(f"--prompt: {completions[0].error}")
    else:
        print(completions[0].text)


def complete(config: GenerateConfig, directory: epath.Path, prompts: Sequence[str]) -> "list[Completion]":
    """A `Completion` for each prompt, in the order of the prompts."""
    # Imported here, as below, so that --help and mistakes in the settings answer at once.
    from isheep_jax.checkpoint.pretrained import open_model
    from isheep_jax.decode.requests import Request
    from isheep_jax.text.conversation import Message

    model = open_model(directory, config.chat_template)
    engine = make_engine(config, model, slots=min(config.slots, len(prompts)))
    bare = config.raw or not model.tokenizer.has_chat_template
    requests = [Request(str(i), text if bare else (Message("user", text),)) for i, text in enumerate(prompts)]
    completions = {c.id: c for c in engine.generate(requests, sampling_of(config))}
    # A template may put a space before an answer; the loop strips it too.
    return [c if bare else dataclasses.replace(c, text=c.text.strip()) for c in (completions[r.id] for r in requests)]


def converse(config: GenerateConfig, directory: epath.Path) -> None:
    """A conversation on standard input and output. Raises `UserError` for a model without a chat template."""
    from isheep_jax.checkpoint.pretrained import open_model
    from isheep_jax.cli.chat import chat

    model = open_model(directory, config.chat_template)
    if not model.tokenizer.has_chat_template:
        raise UserError(
            f"--chat: {directory} is a base model without a chat template; name one, such as --chat_template=plain, or "
            "let it continue a text (--prompt)"
        )
    engine = make_engine(config, model, slots=1, steps_per_call=_CHAT_CHUNK)
    chat(engine, sampling_of(config))


def sampling_of(config: GenerateConfig) -> "SamplingParams":
    from isheep_jax.decode.requests import SamplingParams

    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_tokens,
        stop=config.stop,
        top_k=config.top_k,
        min_p=config.min_p,
        repetition_penalty=config.repetition_penalty,
        presence_penalty=config.presence_penalty,
    )


def make_engine(config: GenerateConfig, model: "Pretrained", *, slots: int, **decode: int) -> "Engine":
    """The model on all devices, with at least so many slots, as many as divide over the replicas of the weights."""
    import jax
    import jax.numpy as jnp

    from isheep_jax.decode.cache import data_shards
    from isheep_jax.decode.engine import Engine
    from isheep_jax.model.architecture import parameter_table
    from isheep_jax.runtime.devices import use_compilation_cache
    from isheep_jax.sharding import DECODE_RULES, check_divisible, decode_mesh, make_mesh

    use_compilation_cache()
    mesh = decode_mesh(make_mesh(MeshConfig()), config.decode_tensor)
    check_divisible(parameter_table(model.architecture), mesh, DECODE_RULES)
    dtype = config.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    dtype = jnp.dtype(dtype)
    params = model.load(mesh=mesh, rules=DECODE_RULES, dtype=dtype)
    shards = data_shards(mesh)
    settings = DecodeConfig(
        slots=-(-slots // shards) * shards,
        max_length=min(config.context, model.architecture.context_length),
        **decode,
    )
    return Engine(
        params, model.architecture, model.tokenizer, settings, mesh=mesh, seed=config.seed, compute_dtype=dtype
    )


def read_prompts(path: Path) -> list[dict]:
    """The lines of a JSON Lines file of prompts. Raises `UserError` with the line's number for a malformed one."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"--input: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"--input: cannot read {path}: {error.strerror}") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error.msg})") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt", record.get("instruction")), str):
            raise UserError(
                f'{path}, line {number}: expected {{"prompt": "..."}} or {{"instruction": "...", "input": "..."}}'
            )
        records.append(record)
    if not records:
        raise UserError(f"--input: {path} holds no prompts")
    return records


def text_of(record: dict) -> str:
    """The prompt of a record: instruction and input are joined by a newline, as in the loop."""
    if "prompt" in record:
        return record["prompt"]
    return "\n".join(part for part in (record["instruction"], record.get("input")) if part)


if __name__ == "__main__":
    sys.exit(run_command(main, MODULE))
