"""The command that completes prompts with any checkpoint, or holds a conversation.

python -m isheep_jax.generate --model runs/tiny --prompt "..."
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from etils import epath

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import run_command, without_sections
from isheep_jax.cli.settings import WITHOUT_PREFIX
from isheep_jax.config import ChatTemplate, DecodeConfig
from isheep_jax.config_checks import RANGES
from isheep_jax.decode.requests import SAMPLING_RANGES, Completion, Request, SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.files import write_atomically
from isheep_jax.runtime.locate import locate_model
from isheep_jax.text.conversation import Message
from isheep_jax.text_files import read_objects, texts

if TYPE_CHECKING:
    from isheep_jax.checkpoint.pretrained import Pretrained
    from isheep_jax.decode.engine import Engine

# How a line of prompts looks.
_LIKE = '{"prompt": "..."} or {"instruction": "...", "input": "..."}'
# Decode steps between two pieces of an answer in a conversation.
_CHAT_STEPS_PER_CALL = 8


@dataclass(frozen=True)
class GenerateOptions:
    """Options of the command."""

    model: str = ""
    """Model directory in Hugging Face format (local or gs://), a run's directory (its newest model), a hub id (org/name
    or org/name@revision), a GGUF file, or 'tiny' (the embedded base)."""
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
    sampling: SamplingParams = field(
        default_factory=lambda: SamplingParams(temperature=0.0, max_tokens=256), metadata=WITHOUT_PREFIX
    )
    seed: int = 0
    """Seed of the random numbers: the same seed and prompts give the same completions."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of weights and activations. 'auto': float32 on CPUs, bfloat16 elsewhere."""
    decode: DecodeConfig = field(
        default_factory=lambda: DecodeConfig(slots=64, max_length=2048), metadata=WITHOUT_PREFIX
    )
    decode_tensor: int = 1
    """Shards of heads and feed-forward units (count); the other devices hold replicas of the weights."""


COMMAND = Command(
    module="isheep_jax.generate",
    options=GenerateOptions,
    usage=(
        '--model DIRECTORY --prompt "..."',
        "--model DIRECTORY --input prompts.jsonl --output out.jsonl",
        "--model DIRECTORY --chat",
    ),
    about="Prints the completion and nothing else, completes a file of prompts, or holds a conversation.",
    example='--model runs/tiny --prompt "..."',
    required=("model",),
    everyday=("model", "prompt", "input", "output", "chat", "raw", "temperature", "max_tokens", "seed"),
    hidden=("logprobs", "steps_per_call"),
    ranges={
        **SAMPLING_RANGES,
        "slots": RANGES["decode.slots"],
        "max_length": RANGES["decode.max_length"],
    },
)


def main(arguments: Sequence[str]) -> None:
    """Completes one prompt or a file of prompts. Raises `UserError` for bad input or a prompt that does not fit."""
    options = COMMAND.parse(arguments)
    if bool(options.prompt) + bool(options.input) + options.chat != 1:
        raise UserError("give either --prompt, a text, or --input, a JSON Lines file of prompts, or --chat")
    if options.raw and options.chat:
        raise UserError("--raw: a conversation needs the chat template; leave out --raw or --chat")
    if options.output and not options.input:
        raise UserError("--output: it holds the lines of --input with their completions; give --input too")
    try:
        _run(options)
    except UserError as error:
        raise UserError(without_sections(str(error), "decode", "mesh")) from error


def _run(options: GenerateOptions) -> None:
    directory = locate_model(options.model)
    if options.chat:
        converse(options, directory)
        return
    records = read_prompts(Path(options.input)) if options.input else [{"prompt": options.prompt}]
    if options.output and not Path(options.output).parent.is_dir():
        raise UserError(f"--output: there is no directory {Path(options.output).parent}")

    completions = complete(options, directory, [text_of(record) for record in records])

    if options.input:
        answers = [
            {"completion": c.text, "finish_reason": c.finish_reason}
            | ({"error": without_sections(c.error, "decode", "mesh")} if c.error else {})
            for c in completions
        ]
        text = "".join(json.dumps(r | a, ensure_ascii=False) + "\n" for r, a in zip(records, answers, strict=True))
        if options.output:
            write_atomically(Path(options.output), text.encode())
        else:
            sys.stdout.write(text)
    elif completions[0].finish_reason == "error":
        raise UserError(f"--prompt: {completions[0].error}")
    else:
        print(completions[0].text)


def complete(options: GenerateOptions, directory: epath.Path, prompts: Sequence[str]) -> list[Completion]:
    """Returns a `Completion` for each prompt, in the order of the prompts."""
    # Imported here, as below, so that --help and mistakes in the settings answer at once.
    from isheep_jax.checkpoint.pretrained import open_model

    model = open_model(directory, options.chat_template)
    slots = min(options.decode.slots, len(prompts))
    engine = _engine(options, model, dataclasses.replace(options.decode, slots=slots))
    bare = options.raw or not model.tokenizer.has_chat_template
    requests = [Request(str(i), text if bare else (Message("user", text),)) for i, text in enumerate(prompts)]
    completions = {c.id: c for c in engine.generate(requests, options.sampling)}
    # A template may put a space before an answer; the loop strips it too.
    return [c if bare else dataclasses.replace(c, text=c.text.strip()) for c in (completions[r.id] for r in requests)]


def converse(options: GenerateOptions, directory: epath.Path) -> None:
    """Holds a conversation on standard input and output. Raises `UserError` for a model without a chat template."""
    from isheep_jax.checkpoint.pretrained import open_model
    from isheep_jax.cli.chat import chat

    model = open_model(directory, options.chat_template)
    if not model.tokenizer.has_chat_template:
        raise UserError(
            f"--chat: {directory} is a base model without a chat template; name one, such as --chat_template=plain, or "
            "let it continue a text (--prompt)"
        )
    decode = dataclasses.replace(options.decode, slots=1, steps_per_call=_CHAT_STEPS_PER_CALL)
    chat(_engine(options, model, decode), options.sampling)


def _engine(options: GenerateOptions, model: "Pretrained", decode: DecodeConfig) -> "Engine":
    from isheep_jax.runtime.load import make_engine

    return make_engine(
        model,
        decode=decode,
        decode_tensor=options.decode_tensor,
        compute_dtype=options.compute_dtype,
        seed=options.seed,
    )


def read_prompts(path: Path) -> list[dict]:
    """Reads the prompts of a JSON Lines file or of a JSON array. Raises `UserError` with the number of a bad line."""
    records = []
    for where, record in read_objects(path, "--input", _LIKE):
        if "prompt" in record:
            texts(f"--input: {where}", record, ("prompt",))
        else:
            texts(f"--input: {where}", record, ("instruction",), ("input",))
        records.append(record)
    return records


def text_of(record: dict) -> str:
    """Returns the prompt of a record: instruction and input are joined by a newline, as in the loop."""
    if "prompt" in record:
        return record["prompt"]
    return "\n".join(part for part in (record["instruction"], record.get("input")) if part)


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
