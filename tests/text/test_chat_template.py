import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
from jinja2 import Environment

from isheep_jax.config import ChatTemplate
from isheep_jax.errors import UserError
from isheep_jax.text import chat_template
from isheep_jax.text.chat_template import (
    CHAT_TEMPLATES,
    check_syntax,
    named_template,
    render_template,
    without_thinking,
)

MESSAGES = [{"role": "user", "content": 'Say "grün".'}, {"role": "assistant", "content": "grün"}]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n  U: {{ m.content }}\n    {% endif %}\n{% endfor %}\n",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}",
        "{% if tools is not none %}tools{% endif %}{{ documents is none }}",
        "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.content }}{% endfor %}{{ eos_token }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% set x = namespace(n=0) %}{% for m in messages %}{% set x.n = x.n + 1 %}{% endfor %}{{ x.n }}",
    ],
)
def test_text_is_transformers_own(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs = render_jinja_template([MESSAGES], chat_template=template, eos_token="</s>")[0][0]
    assert render_template(template, messages=MESSAGES, eos_token="</s>") == theirs


def test_template_that_refuses_or_is_malformed_is_one_line():
    with pytest.raises(UserError, match="no system turns"):
        render_template("{{ raise_exception('no system turns') }}")
    with pytest.raises(UserError, match="chat template cannot render") as caught:
        render_template("{% if %}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template", ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ messages[0]['name'] + 'a' }}", "{{ range(10 ** 9) | list }}"]
)
def test_any_failure_inside_template_is_one_line(template):
    with pytest.raises(UserError, match="chat template cannot render") as caught:
        render_template(template, messages=MESSAGES)
    assert "\n" not in str(caught.value)


def test_syntax_error_names_file_and_line():
    check_syntax("{% for m in messages %}{{ m }}{% endfor %}", "FILE")
    with pytest.raises(UserError, match=r"^FILE is not a valid Jinja template \(line 2\): "):
        check_syntax("\n{% for %}", "FILE")


def test_thinking_is_off_here_and_by_default_in_export():
    template = "\n{% if enable_thinking is defined and not enable_thinking %}quiet{% else %}thinking{% endif %}"
    assert render_template(template) == "\nquiet"
    exported = without_thinking(template)
    assert without_thinking(exported) == exported
    # Other tools render with the choice of their caller, or none.
    plain = Environment(trim_blocks=True, lstrip_blocks=True)
    assert plain.from_string(template).render() == "\nthinking"
    assert plain.from_string(exported).render() == "\nquiet"
    assert plain.from_string(exported).render(enable_thinking=True) == "\nthinking"
    assert without_thinking("{{ messages }}") == "{{ messages }}"


def test_setting_offers_every_named_template():
    assert set(get_args(ChatTemplate)) == {"auto", *CHAT_TEMPLATES}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_named_templates_render_whole_conversation_with_every_text_in_it_once(name):
    turns = [("system", "one"), ("user", "two"), ("assistant", "three"), ("user", "four")]
    messages = [{"role": role, "content": content} for role, content in turns]
    values = {"messages": messages, "bos_token": "<s>", "eos_token": "</s>"}
    text = render_template(named_template(name, has_bos=True), add_generation_prompt=True, **values)
    assert [text.count(content) for _, content in turns] == [1] * 4
    assert text.startswith("<s>")
    assert text == "<s>" + render_template(named_template(name, has_bos=False), add_generation_prompt=True, **values)
    assert text.startswith(render_template(named_template(name, has_bos=True), add_generation_prompt=False, **values))


def test_template_cannot_reach_python():
    with pytest.raises(UserError):
        render_template("{{ ''.__class__.__mro__ }}")


def test_date_in_template_does_not_depend_on_day():
    assert render_template("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 5 s"),
        ("{{ 'a' * 10 ** 11 }}", "needs more than 1024 MiB"),
        (
            "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "MiB of memory",
        ),
        ("{% for i in range(99999) %}{{ 'abc' * 999 }}{% endfor %}", "writes more than 33554432 characters"),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) }}{% endmacro %}{{ f(999) }}", "recursion"),
        ("{{" + "(" * 5000 + ")" * 5000 + "}}", "recursion"),
        ("{{ raise_exception('no\n' * 10 ** 6) }}", "no no no"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
    ],
)
def test_hostile_template_is_one_short_line_and_the_next_one_is_rendered(template, reason):
    with pytest.raises(UserError, match=reason) as caught:
        render_template(template, messages=MESSAGES)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert render_template("{{ messages[1].content }}", messages=MESSAGES) == "grün"


def test_process_that_was_killed_in_between_is_started_again():
    assert render_template("a") == "a"
    os.kill(chat_template._PROCESS._process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="ended the process"):
        render_template("a")
    assert render_template("a") == "a"


def test_template_sees_no_environment_and_draws_the_same_at_random(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret")
    for name in ("environ", "env", "os", "SOME_API_KEY"):
        assert render_template(f"{{{{ {name} }}}}") == ""
    drawn = {render_template("{{ range(1000) | random }} {{ lipsum(1) }}") for _ in range(5)}
    assert len(drawn) == 1


def test_text_with_template_syntax_is_text():
    content = "{{ 7 * 7 }}{% raw %}{# note #}{% for x in y %}"
    messages = [{"role": "user", "content": content}]
    for template in CHAT_TEMPLATES.values():
        assert content in render_template(template, messages=messages, eos_token="")


def test_templates_are_rendered_side_by_side_from_several_threads():
    with ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda i: render_template("{{ i }}", i=i), range(200)))
    assert texts == [str(i) for i in range(200)]
