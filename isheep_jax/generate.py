"""The command that completes prompts with any checkpoint, or holds a conversation.

python -m isheep_jax.generate --model runs/tiny --prompt "..."
"""

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import run_command, without_sections
from isheep_jax.cli.output import as_data, show
from isheep_jax.cli.settings import WITHOUT_PREFIX
from isheep_jax.config import ChatTemplate, DecodeConfig
from isheep_jax.config_checks import RANGES
from isheep_jax.decode.requests import SAMPLING_RANGES, Completion, Request, SamplingParams, TokenIds
from isheep_jax.errors import UserError
from isheep_jax.files import check_output, is_device, write_atomically
from isheep_jax.runtime.locate import locate_model
from isheep_jax.text.conversation import Message, Prompt
from isheep_jax.text_files import read_objects, texts

if TYPE_CHECKING:
    from etils import epath

    from isheep_jax.checkpoint.pretrained import Pretrained
    from isheep_jax.decode.engine import Engine
    from isheep_jax.runtime.kept_completions import KeptCompletions

# How a line of prompts looks.
_LIKE = '{"prompt": "..."} or {"instruction": "...", "input": "..."}'
# Fields that the command writes into the lines of --input.
_WRITTEN = ("completion", "finish_reason", "error")
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
    """JSON Lines file to write: the lines of input with the fields completion and finish_reason. What is done is kept
    in OUTPUT.partial until all of it is, so that the same command goes on where it was stopped. Empty: print them."""
    chat: bool = False
    """Hold a conversation in the terminal: /reset starts a new one, /quit leaves."""
    raw: bool = False
    """Continue the bare text, where names of special tokens are these tokens. Otherwise the prompt is a user's turn, if
    there is a chat template."""
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
    if options.output and os.path.realpath(options.output) == os.path.realpath(options.input):
        raise UserError(f"--output: {options.output} is the file of --input; name another")
    try:
        _run(options)
    except UserError as error:
        raise UserError(without_sections(str(error), "decode", "mesh")) from error


def _run(options: GenerateOptions) -> None:
    if options.chat:
        converse(options, locate_model(options.model, adapters=True))
    elif options.input:
        complete_file(options)
    else:
        (completion,) = _completions(
            options, _open(options, locate_model(options.model, adapters=True)), {"0": options.prompt}
        )
        if completion.finish_reason == "error":
            raise UserError(f"--prompt: {completion.error}")
        print(as_data(completion.text))


def complete_file(options: GenerateOptions) -> None:
    """Completes the prompts of --input, into --output or, in their order as they come, to standard output.

    With --output, completions are kept in OUTPUT.partial until all are there, so that the same command goes on after it
    was stopped; the output is the same as that of a command that was not. Raises `UserError` for bad input, and where
    no prompt could be completed.
    """
    records = read_prompts(Path(options.input))
    prompts = {str(i): text_of(record) for i, record in enumerate(records)}
    output = check_output("--output", options.output) if options.output else None
    model = _open(options, locate_model(options.model, adapters=True))
    with _kept(options, model, output) if output and not is_device(output) else contextlib.nullcontext() as kept:
        completions = _all_completions(options, model, prompts, kept)
        failed = _write_completed(records, completions, output)
        if kept:
            kept.remove()
    if failed:
        text = f"{len(failed)} of {len(records)} prompts have no completion, such as {failed[0]}"
        if len(failed) == len(records):
            raise UserError(f"--input: {text}")
        show(f"note: {text}", stream=sys.stderr)


def _all_completions(
    options: GenerateOptions, model: "Pretrained", prompts: Mapping[str, str], kept: "KeptCompletions | None"
) -> Iterator[Completion]:
    """Yields the completion of each prompt, in the order of the prompts, as soon as it and all before it are there."""
    found = {id: completion for id, prompt in prompts.items() if kept and (completion := kept.find(id, prompt))}
    todo = {id: prompt for id, prompt in prompts.items() if id not in found}
    fresh = _completions(options, model, todo, len(prompts)) if todo else ()
    return _in_order(prompts, itertools.chain(found.values(), _keeping(fresh, kept, prompts) if kept else fresh))


def _write_completed(
    records: Sequence[dict[str, Any]], completions: Iterable[Completion], output: "epath.Path | None"
) -> list[str]:
    """Writes the records with their completions; returns what went wrong, for each one that has none.

    output: a file, which gets all of them in the end; None: each goes to standard output as it comes.
    """
    failed, lines = [], []
    for number, (record, completion) in enumerate(zip(records, completions, strict=True), start=1):
        completed = _completed(record, completion)
        if completion.finish_reason == "error":
            failed.append(f"prompt {number}: {completed['error']}")
        lines.append(json.dumps(completed, ensure_ascii=False) + "\n")
        if not output:
            sys.stdout.write(as_data(lines.pop()))
            sys.stdout.flush()
    if output:
        write_atomically(output, "".join(lines).encode())
    return failed


def _kept(
    options: GenerateOptions, model: "Pretrained", output: "epath.Path"
) -> "contextlib.AbstractContextManager[KeptCompletions]":
    """Opens what is there of the completions that these options give."""
    import jax

    from isheep_jax.runtime.kept_completions import kept_completions

    decode = {name: getattr(options.decode, name) for name in ("max_length", "weights_dtype", "kv_cache_dtype")}
    settings = {
        "model": model.weights_digest(),
        "chat_template": options.chat_template,
        "raw": options.raw,
        **dataclasses.asdict(options.sampling),
        "seed": options.seed,
        "compute_dtype": options.compute_dtype,
        "platform": jax.default_backend(),
        **decode,
    }
    return kept_completions(output.with_name(output.name + ".partial"), settings)


def _keeping(
    completions: Iterable[Completion], kept: "KeptCompletions", prompts: Mapping[str, str]
) -> Iterator[Completion]:
    for completion in completions:
        kept.add(completion, prompts[completion.id])
        yield completion


def _in_order(ids: Iterable[str], completions: Iterable[Completion]) -> Iterator[Completion]:
    waiting: dict[str, Completion] = {}
    completions = iter(completions)
    for id in ids:
        while id not in waiting:
            completion = next(completions)
            waiting[completion.id] = completion
        yield waiting.pop(id)


def _completed(record: dict[str, Any], completion: Completion) -> dict[str, Any]:
    """Returns a line of the input with its completion; what an earlier command wrote into these fields is gone."""
    rest = {name: value for name, value in record.items() if name not in _WRITTEN}
    answer = {"completion": completion.text, "finish_reason": completion.finish_reason}
    return rest | answer | ({"error": without_sections(completion.error, "decode", "mesh")} if completion.error else {})


def _open(options: GenerateOptions, directory: "epath.Path") -> "Pretrained":
    # Imported here, as below, so that --help and mistakes in the settings answer at once.
    from isheep_jax.runtime.opening import open_located

    model = open_located(directory, options.chat_template)
    if not options.raw:
        model.check_messages()
    return model


def _completions(
    options: GenerateOptions, model: "Pretrained", prompts: Mapping[str, str], most: int = 1
) -> Iterator[Completion]:
    """Yields a `Completion` for each prompt by its id, in the order in which they finish.

    most: completions side by side that there may be, so that a command that goes on has the programs of the first.
    """
    engine = _engine(options, model, dataclasses.replace(options.decode, slots=min(options.decode.slots, most)))
    bare = options.raw or not model.tokenizer.has_chat_template

    def prompt_of(text: str) -> Prompt | TokenIds:
        if options.raw:  # the user may have written the model's own markers
            return TokenIds(tuple(model.tokenizer.encode(text)))
        return text if bare else (Message("user", text),)

    requests = [Request(id, prompt_of(text)) for id, text in prompts.items()]
    for completion in engine.generate(requests, options.sampling):
        # A template may put a space before an answer; the loop strips it too.
        yield completion if bare else dataclasses.replace(completion, text=completion.text.strip())


def converse(options: GenerateOptions, directory: "epath.Path") -> None:
    """Holds a conversation on standard input and output. Raises `UserError` for a model without a chat template."""
    from isheep_jax.cli.chat import chat

    model = _open(options, directory)
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
        elif "instruction" not in record:
            raise UserError(f"--input: {where}: 'prompt' (or 'instruction') is missing")
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
