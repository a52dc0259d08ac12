"""Chat templates: renders them as transformers does, and defines the ones that users choose by name."""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from isheep_jax.errors import UserError
from isheep_jax.text import template_worker

# Templates for base models, which have none of their own; `config.ChatTemplate` has the same names. Each ends an answer
# with one end-of-turn token if the vocabulary has it. `named_template` adds the beginning-of-text token.
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{% for message in messages %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # Gemma has no system turn: the system message is put at the start of the next user turn.
    "gemma": (
        "{% set system = namespace(text='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}{% set system.text = message['content'] + '\n\n' %}{% else %}"
        "<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}\n"
        "{{ (system.text + message['content']) | trim }}<end_of_turn>\n{% set system.text = '' %}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # For vocabularies without turn markers: headers in words, and the end-of-text token as the end of an answer.
    "plain": (
        "{% for message in messages %}"
        "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
        "{{ eos_token if message['role'] == 'assistant' else '' }}\n\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
    ),
}
_NO_THINKING = "{% if enable_thinking is not defined %}{% set enable_thinking = false %}{% endif %}"


def named_template(name: str, has_bos: bool) -> str:
    """Returns one of `CHAT_TEMPLATES`. has_bos: whether the tokenizer begins texts with a beginning-of-text token."""
    return ("{{ bos_token }}" if has_bos else "") + CHAT_TEMPLATES[name]


def without_thinking(template: str) -> str:
    """Returns the template with enable_thinking=false as the default, for exports.

    Other tools then also ask the model, which was trained on answers without thoughts, for such answers.
    """
    if "enable_thinking" not in template or template.startswith(_NO_THINKING):
        return template
    # Rendering drops a line break that follows a block.
    return _NO_THINKING + ("\n" if template.startswith("\n") else "") + template


def check_syntax(template: str, source: str) -> None:
    """Raises `UserError` when the template is malformed. source: the file that holds it, for the message."""
    reply = _PROCESS.ask({"template": template, "values": None})
    if "error" in reply:
        position = f" (line {reply['line']})" if reply["line"] else ""
        raise UserError(f"{source} is not a valid Jinja template{position}: {reply['error']}")


def render_template(template: str, **values: Any) -> str:
    """Renders a template with JSON values, in a process of its own with limits of time, memory and size.

    Thinking is switched off: the template of a thinking model then ends the prompt with empty thoughts. Raises
    `UserError` when the template is malformed, refuses the conversation or exceeds a limit.
    """
    # Templates test whether these two are none; an undefined name is not none.
    values = {"tools": None, "documents": None, "enable_thinking": False, **values}
    reply = _PROCESS.ask({"template": template, "values": values})
    if "error" in reply:
        raise UserError(f"the chat template cannot render the conversation: {reply['error']}")
    return reply["text"]


class _Process:
    """The process of `template_worker`, started when it is needed first, and again after a template has ended it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Returns the answer to a request of `template_worker`."""
        with self._lock:
            process = self._started()
            try:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
                reply = process.stdout.readline()
            except BrokenPipeError:
                reply = b""
            except BaseException:  # interrupted in between, so that the next answer would be that of this request
                self.end()
                raise
            if reply.endswith(b"\n"):
                return json.loads(reply)
            self.end()
            return {"error": _reason(process.returncode), "line": None}

    def end(self) -> None:
        """Ends the process, if this one has started it."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()

    def _started(self) -> subprocess.Popen:
        if self._process is None or self._owner != os.getpid():  # a fork must not share the pipes
            # Neither settings nor secrets of this process reach the template.
            environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH") if name in os.environ}
            places = dict.fromkeys(str(Path(module.__file__).parents[1]) for module in (jinja2, markupsafe))
            self._process = subprocess.Popen(
                [sys.executable, "-B", "-P", "-S", template_worker.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": os.pathsep.join(places)},
                start_new_session=True,  # Ctrl-C is for this process
            )
            self._owner = os.getpid()
        return self._process


def _reason(code: int) -> str:
    """Returns what a template did whose process has ended with this exit code."""
    if code == -signal.SIGPROF:
        return f"it takes more than {template_worker.CPU_SECONDS} s"
    return f"it has ended the process that renders it (exit code {code})"


_PROCESS = _Process()
atexit.register(_PROCESS.end)
