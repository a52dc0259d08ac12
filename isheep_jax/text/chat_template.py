"""Chat templates: renders them as transformers does, and defines the ones that users choose by name."""

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isheep_jax.errors import UserError, one_line

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
# The date that templates write as today's, so that a run resumed on another day gives the same records.
_TODAY = datetime.date(2024, 7, 26)


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
    try:
        _compiled(template)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        position = f" (line {line})" if line else ""
        raise UserError(f"{source} is not a valid Jinja template{position}: {one_line(error)}") from None


def render_template(template: str, **values: Any) -> str:
    """Renders a template. Raises `UserError` when it is malformed or refuses the conversation.

    Thinking is switched off: the template of a thinking model then ends the prompt with empty thoughts.
    """
    try:
        # Templates test whether these two are none; an undefined name is not none.
        return _compiled(template).render(tools=None, documents=None, enable_thinking=False, **values)
    except Exception as error:  # a template is a program, and may fail in any way
        raise UserError(f"the chat template cannot render the conversation: {one_line(error)}") from None


class _Generation(jinja2.ext.Extension):
    """Treats {% generation %}, which marks what the model writes, as a plain block; the loss mask is made elsewhere."""

    tags = {"generation"}  # noqa: RUF012 (the base class's attribute)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Compiles a template in a sandbox, with trimmed blocks and the functions that transformers adds."""

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment.from_string(template)
