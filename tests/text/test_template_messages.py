"""A chat template that leaves out what the user says is refused before anything is generated."""

import shutil

import pytest

from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.errors import UserError
from isheep_jax.generate import main


@pytest.mark.parametrize("template", ["hello", "{% for m in messages %}<|user|>{% endfor %}"])
def test_template_without_the_users_message_is_refused(small_checkpoint, tmp_path, template):
    shutil.copytree(small_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"the chat template leaves out what the user says: 'Name a color\.' becomes"):
        main([f"--model={tmp_path}/model", "--prompt=Swap cat and red."])


def test_template_of_the_model_passes(small_checkpoint):
    open_model(small_checkpoint).check_messages()


def test_bare_text_needs_no_template(small_checkpoint, tmp_path, capsys):
    shutil.copytree(small_checkpoint, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("hello")
    main([f"--model={tmp_path}/model", "--prompt=Swap", "--raw", "--max_tokens=2"])
    assert capsys.readouterr().out.endswith("\n")
