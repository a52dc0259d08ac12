"""`check_template` accepts templates with the structure of the known families' and refuses broken ones."""

import json
from pathlib import Path

import pytest
from small_tokenizers import write_byte_level, write_sentencepiece

from isheep_jax.errors import UserError
from isheep_jax.text.chat_template import CHAT_TEMPLATES
from isheep_jax.text.conversation import Message
from isheep_jax.text.template_check import check_template
from isheep_jax.text.tokenizer import Tokenizer

TINY = Path(__file__).parents[2] / "isheep_jax" / "tiny" / "checkpoint"
ALTERNATE = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
TEMPLATES = {
    # Trims; the beginning of text goes before the first header.
    "llama3": (
        "{% for m in messages %}{{ bos_token if loop.first else '' }}"
        "{{ '<|start_header_id|>' ~ m['role'] ~ '<|end_header_id|>\n\n' ~ m['content'] | trim ~ '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    # No header for the assistant; spaces around the answer; the system text inside the first user turn.
    "llama2": (
        "{% if messages[0]['role'] == 'system' %}{% set turns = messages[1:] %}"
        "{% set before = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
        "{% else %}{% set turns = messages %}{% set before = '' %}{% endif %}"
        "{% for m in turns %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (before if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    # Adds a system turn if there is none.
    "qwen2": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe a helpful assistant.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    # Adds an empty thought before the last answer only.
    "qwen3": (
        "{%- for m in messages %}"
        "{%- if m.role == 'assistant' and loop.last %}"
        "{%- set content = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{%- set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
        "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content }}{%- endif %}"
        "{{- '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
        "{%- endif %}"
    ),
    # Trims, calls the assistant model, refuses system turns.
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
        + ALTERNATE
        + "{% for m in messages %}"
        "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim "
        "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # Like Llama 2's, without a space after the answer and with one beginning of text.
    "mistral": (
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    # Headers in words; the end of text ends an answer, and a line break follows unless it is the last.
    "olmo2": (
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% if not (m['role'] == 'assistant' and loop.last) %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
# Prompt and trained tokens of each family's template for a question with the answer "Ab."
SHAPES = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Ab.<|eot_id|>",
    ),
    "llama2": ("<s>[INST] Q? [/INST]", " Ab. </s>"),
    "qwen2": (
        "<|im_start|>system\nBe a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n",
        "Ab.<|im_end|>",
    ),
    "qwen3": (
        "<|im_start|>user\nQ?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Ab.<|im_end|>",
    ),
    "gemma": ("<bos><start_of_turn>user\nQ?<end_of_turn>\n<start_of_turn>model\n", "Ab.<end_of_turn>"),
    "mistral": ("<s>[INST] Q? [/INST]", "Ab.</s>"),
    "olmo2": ("<|endoftext|><|user|>\nQ?\n<|assistant|>\n", "Ab.<|endoftext|>"),
}
# Named templates that suit each family's vocabulary.
FITTING = {
    "llama3": ["llama3", "plain"],
    "llama2": ["plain"],
    "qwen2": ["chatml", "plain"],
    "qwen3": ["chatml", "plain"],
    "gemma": ["gemma", "plain"],
    "mistral": ["plain"],
    "olmo2": ["plain"],
}
QUESTION = (Message("user", "Q?"),)


def write_family(name: str, directory: Path) -> Path:
    """Writes a directory with a tokenizer like the family's and no template."""
    if name == "llama3":
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return write_byte_level(directory, special, bos_token=special[0], eos_token=special[1])
    if name in ("qwen2", "qwen3"):
        special, plain = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], ("<think>", "</think>")
        return write_byte_level(directory, special, plain, eos_token="<|im_end|>", add_bos_token=False)
    if name == "olmo2":
        return write_byte_level(directory, ["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    if name == "gemma":
        symbols = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "▁▁", "▁▁▁"]
        pieces = {"bos_piece": "<bos>", "eos_piece": "<eos>", "user_defined_symbols": symbols}
        return write_sentencepiece(directory, **pieces)
    return write_sentencepiece(directory, add_dummy_prefix=True, user_defined_symbols=[])


@pytest.fixture(scope="module", params=TEMPLATES)
def family(request, tmp_path_factory) -> tuple[str, Path]:
    directory = write_family(request.param, tmp_path_factory.mktemp("families") / request.param)
    (directory / "chat_template.jinja").write_text(TEMPLATES[request.param])
    return request.param, directory


def trained_part(tokenizer: Tokenizer, conversation, answer: str) -> list[int]:
    return [i for i, m in zip(*tokenizer.encode_example(conversation, answer)) if m]


def test_each_familys_template_passes_and_trains_answer_and_its_end(family):
    name, directory = family
    tokenizer = Tokenizer.load(directory)
    check_template(tokenizer)
    prompt, trained = SHAPES[name]
    assert tokenizer.render(QUESTION) == prompt
    assert tokenizer.spell(trained_part(tokenizer, QUESTION, "Ab.")).strip() == trained.strip()
    ids, mask = tokenizer.encode_example(QUESTION, "Ab.")
    assert ids[: mask.index(1)] == tokenizer.encode_prompt(QUESTION)
    assert ids[-1] in tokenizer.eos_ids
    assert tokenizer.decode([i for i, m in zip(ids, mask) if m][:-1]).strip() == "Ab."


def test_each_familys_template_is_rendered_as_transformers_renders_it_from_export(family, tmp_path):
    from transformers import AutoTokenizer

    _, directory = family
    tokenizer = Tokenizer.load(directory)
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), Tokenizer.load(tmp_path)
    for turns in (QUESTION, (*QUESTION, Message("assistant", "red cat"), Message("user", "the answer?"))):
        messages = [{"role": m.role, "content": m.content} for m in turns]
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert text == tokenizer.render(turns) == again.render(turns)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == tokenizer.encode_prompt(turns) == again.encode_prompt(turns)
        answered = [*messages, {"role": "assistant", "content": "green"}]
        text = theirs.apply_chat_template(answered, tokenize=False)
        assert text == tokenizer.render(turns, "green") == again.render(turns, "green")
    assert again.eos_ids == tokenizer.eos_ids
    assert again.encode_example(QUESTION, "green") == tokenizer.encode_example(QUESTION, "green")


def test_base_without_template_is_told_which_named_ones_fit_and_these_pass(family, tmp_path):
    name, _ = family
    base = Tokenizer.load(write_family(name, tmp_path / "base"))
    with pytest.raises(UserError) as caught:
        check_template(base)
    message = str(caught.value)
    assert message == (
        f"{tmp_path / 'base'}: there is no chat template; set model.chat_template to one of: {', '.join(FITTING[name])}"
    )
    for choice in CHAT_TEMPLATES:
        tokenizer = Tokenizer.load(tmp_path / "base", choice)
        if choice not in FITTING[name]:
            with pytest.raises(UserError, match="the chat template ends the answer with"):
                check_template(tokenizer)
            continue
        check_template(tokenizer)
        trained = trained_part(tokenizer, QUESTION, "red\ncat")
        assert tokenizer.decode(trained) == "red\ncat"
        assert trained[-1] in tokenizer.eos_ids
        assert (tokenizer.encode_prompt(QUESTION)[:1] == [tokenizer.bos_id]) == (tokenizer.bos_id is not None)


def test_named_templates_end_of_turn_stops_generation_where_vocabulary_has_it(tmp_path):
    markers = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "plain": "</s>"}
    assert set(markers) == set(CHAT_TEMPLATES)
    write_byte_level(tmp_path, list(markers.values()), eos_token="</s>")
    for name, marker in markers.items():
        tokenizer = Tokenizer.load(tmp_path, name)
        check_template(tokenizer)
        assert tokenizer.spell(trained_part(tokenizer, QUESTION, "Ab.")[-1:]) == marker
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        assert Tokenizer.load(tmp_path / name).eos_ids == tokenizer.eos_ids


def test_marker_that_vocabulary_lacks_is_shown_as_text_that_it_would_train(tmp_path):
    directory = write_family("llama2", tmp_path)
    with pytest.raises(UserError) as caught:
        check_template(Tokenizer.load(directory, "chatml"))
    assert str(caught.value) == (
        f"{directory}: the chat template ends the answer with '<|im_end|>', which is no token of this vocabulary and "
        r"is trained on as text; the trained part is in [[ ]]: '<s><|im_start|>user\nName a color.<|im_end|>\n"
        r"<|im_start|>assistant\n[[Blue.<|im_end|>\n</s>]]'; set model.chat_template to one of: plain"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        # The prompt opens a thought that the answered conversation does not have.
        (("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"), "rewrites the prompt once an answer follows"),
        # A thought is written with the answer, not with the prompt.
        (
            ("{{ message['content'] }}", "{{ '<think></think>' * (loop.index0 % 2) }}{{ message['content'] }}"),
            "puts '<think></think>' between the prompt and the answer, and it is trained on",
        ),
        (("}}<|im_end|>", "}}<|stop|>"), "ends the answer with '<|stop|>', which is a token that does not stop"),
        (("}}<|im_end|>", "}}<|stop|><|im_end|>"), "ends the answer with '<|stop|>'"),
        (("message['content']", "message['content'] | upper"), "changes the answer"),
        # " " and "Blue" are one token.
        (("assistant\n{% endif %}", "assistant: {% endif %}", "role'] }}\n", "role'] }}: "), "inside a token"),
        (("{% for", "{% if messages | length == 1 %}{{ raise_exception('too short') }}{% endif %}{% for"), "too short"),
    ],
    ids=["open thought", "trained thought", "unknown end", "two ends", "changed", "merged", "refused"],
)
def test_template_that_breaks_property_is_refused_in_one_line_that_names_it(tmp_path, change, message):
    write_byte_level(tmp_path, ["<|im_start|>", "<|im_end|>", "<|stop|>"], eos_token="<|im_end|>")
    text = CHAT_TEMPLATES["chatml"]
    for old, new in zip(change[::2], change[1::2]):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "chat_template.jinja").write_text(text)
    with pytest.raises(UserError) as caught:
        check_template(Tokenizer.load(tmp_path))
    assert message in str(caught.value)
    assert str(caught.value).endswith("set model.chat_template to one of: chatml, plain")
    assert str(caught.value).startswith(f"{tmp_path}: ")
    assert "\n" not in str(caught.value)
    check_template(Tokenizer.load(tmp_path, "chatml"))


def test_end_of_turn_named_in_config_json_counts(tmp_path):
    write_byte_level(tmp_path, ["<|im_start|>", "<|im_end|>", "<|stop|>"], eos_token="<|im_end|>")
    (tmp_path / "chat_template.jinja").write_text(CHAT_TEMPLATES["chatml"].replace("}}<|im_end|>", "}}<|stop|>"))
    with pytest.raises(UserError, match="does not stop generation"):
        check_template(Tokenizer.load(tmp_path))
    stop = Tokenizer.load(tmp_path).encode("<|stop|>")
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": stop}))
    check_template(Tokenizer.load(tmp_path))
    assert trained_part(Tokenizer.load(tmp_path), QUESTION, "Ab.")[-1:] == stop


def test_tokenizer_without_end_is_refused(tmp_path):
    write_byte_level(tmp_path, ["<|im_start|>"])
    for choice in ("auto", "chatml", "plain"):
        tokenizer = Tokenizer.load(tmp_path, choice)
        with pytest.raises(UserError, match="no token ends a text; name one as eos_token in tokenizer_config"):
            check_template(tokenizer)


def test_end_named_by_id_alone_serves_templates_that_write_it(tmp_path):
    write_byte_level(tmp_path, ["<|done|>"])
    end = Tokenizer.load(tmp_path).encode("<|done|>")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": end[0]}))
    tokenizer = Tokenizer.load(tmp_path, "plain")
    check_template(tokenizer)
    assert trained_part(tokenizer, QUESTION, "Ab.") == [*tokenizer.encode("Ab."), *end]


def test_thinking_models_export_answers_without_thoughts_unless_asked(tmp_path):
    from transformers import AutoTokenizer

    directory = write_family("qwen3", tmp_path / "in")
    (directory / "chat_template.jinja").write_text(TEMPLATES["qwen3"])
    (tmp_path / "out").mkdir()
    Tokenizer.load(directory).save(tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Q?"}]
    for choice, end in (({}, "</think>\n\n"), ({"enable_thinking": True}, "assistant\n")):
        text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **choice)
        assert text.endswith(end)


def test_embedded_models_own_template_passes():
    tokenizer = Tokenizer.load(TINY)
    check_template(tokenizer)
    for name in CHAT_TEMPLATES.keys() - {"plain"}:
        with pytest.raises(UserError, match="one of: plain"):
            check_template(tokenizer.with_template(name))


def test_response_that_spells_the_end_of_a_thought_is_refused_by_itself(tmp_path):
    directory = write_family("qwen3", tmp_path / "in")
    (directory / "chat_template.jinja").write_text(TEMPLATES["qwen3"])
    tokenizer = Tokenizer.load(directory)
    check_template(tokenizer)
    with pytest.raises(UserError, match="not stable when the answer is appended"):
        tokenizer.encode_example(QUESTION, "Thoughts end with </think> here.")
