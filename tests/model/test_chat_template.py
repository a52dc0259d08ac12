import pytest

from isheep_jax.errors import UserError
from isheep_jax.model.chat_template import render_template

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
def test_the_text_is_transformers_own(template):
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs = render_jinja_template([MESSAGES], chat_template=template, eos_token="</s>")[0][0]
    assert render_template(template, messages=MESSAGES, eos_token="</s>") == theirs


def test_a_template_that_refuses_or_is_malformed_is_one_line():
    with pytest.raises(UserError, match="no system turns"):
        render_template("{{ raise_exception('no system turns') }}")
    with pytest.raises(UserError, match="chat template cannot render") as caught:
        render_template("{% if %}")
    assert "\n" not in str(caught.value)


def test_a_template_cannot_reach_python():
    with pytest.raises(UserError):
        render_template("{{ ''.__class__.__mro__ }}")


def test_a_date_in_a_template_does_not_depend_on_the_day():
    assert render_template("{{ strftime_now('%d %b %Y') }}") == "26 Jul 2024"
