"""Chat templates: rendered as transformers renders them, and two to choose from."""

import datetime
import functools
import json
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isheep_jax.errors import UserError

# For base models, which have no template of their own. Each ends an answer with a token that ends the turn.
CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] }}<|eot_id|>"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
}
# Templates that write today's date get this one, so that a run resumed tomorrow gives the same records.
_TODAY = datetime.date(2024, 7, 26)


def render_template(template: str, **values: Any) -> str:
    """The text of a template. Raises `UserError` when it is malformed or refuses the conversation."""
    try:
        # A template may ask whether these two are none, which an undefined name is not.
        return _compiled(template).render(tools=None, documents=None, **values)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template cannot render the conversation: {error}") from None


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks what the model writes, for masks that are made here in another way: a plain block."""

    tags = {"generation"}  # noqa: RUF012 (the base class's attribute)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Sandboxed, blocks trimmed, with the functions that transformers adds."""

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
