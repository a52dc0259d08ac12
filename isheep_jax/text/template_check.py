"""Tests a chat template with its tokenizer before anything is generated or trained."""

from isheep_jax.errors import UserError, quoted
from isheep_jax.text.chat_template import CHAT_TEMPLATES
from isheep_jax.text.conversation import Conversation, Message
from isheep_jax.text.tokenizer import Tokenizer

_QUESTION = Message("user", "Name a color.")
# A template must render the first conversation. It may refuse the others, and is then not used with them.
_CONVERSATIONS: tuple[Conversation, ...] = (
    (_QUESTION,),
    (_QUESTION, Message("assistant", "Red."), Message("user", "And one more?")),
    (Message("system", "Be brief."), _QUESTION),
)
# Characters of a rendered text that an error shows.
_SHOWN = 1000
_ANSWERS = ("Blue.", "Two come to mind:\n- blue\n- green")


def check_template(tokenizer: Tokenizer) -> None:
    """Raises `UserError` unless prompts and training examples have the same tokens.

    Three properties are checked with short conversations: the prompt is a prefix of the prompt with its answer, in text
    and in tokens; the loss mask covers the answer (with the white space that the template puts around it) and one
    end-of-turn token; that token stops generation. A caller that can do without a chat template asks
    `tokenizer.has_chat_template` first.
    """
    if not tokenizer.eos_ids:
        raise UserError(
            f"{tokenizer.directory}: no token ends a text; name one as eos_token in tokenizer_config.json or as "
            "eos_token_id in generation_config.json"
        )
    problem = _problem(tokenizer) if tokenizer.has_chat_template else "there is no chat template"
    if problem is not None:
        raise UserError(f"{tokenizer.directory}: {problem}; {_advice(tokenizer)}")


def check_shows_messages(tokenizer: Tokenizer) -> None:
    """Raises `UserError` when the chat template leaves out what the user says; one that refuses a question passes."""
    try:
        shown = tokenizer.render((_QUESTION,))
    except UserError:
        return
    if _QUESTION.content not in shown:
        raise UserError(
            f"{tokenizer.directory}: the chat template leaves out what the user says: {_QUESTION.content!r} becomes "
            f"{_shown(shown)}; {_advice(tokenizer)}"
        )


def template_markers(tokenizer: Tokenizer) -> dict[int, str]:
    """Returns the control tokens that the chat template writes, and the end of an answer, by their ids.

    Not among them is the token that begins every text.
    """
    ids, _ = tokenizer.encode_example((_QUESTION,), _ANSWERS[0])
    return {i: tokenizer.spell([i]) for i in dict.fromkeys(ids) if i in tokenizer.control_ids and i != tokenizer.bos_id}


def fitting_templates(tokenizer: Tokenizer) -> list[str]:
    """Returns the names of `CHAT_TEMPLATES` that suit the tokenizer."""
    return [name for name in CHAT_TEMPLATES if _problem(tokenizer.with_template(name)) is None]


def _advice(tokenizer: Tokenizer) -> str:
    fitting = fitting_templates(tokenizer)
    if not fitting:
        return "no named template fits this tokenizer either"
    return f"set model.chat_template to one of: {', '.join(fitting)}"


def _problem(tokenizer: Tokenizer) -> str | None:
    """Describes the first property that fails, with the text that shows it."""
    for conversation in _CONVERSATIONS:
        try:
            prompt = tokenizer.render(conversation)
        except UserError as error:
            if conversation is _CONVERSATIONS[0]:
                return str(error)
            continue
        for answer in _ANSWERS:
            try:
                whole = tokenizer.render(conversation, answer)
            except UserError as error:
                return str(error)
            problem = _prefix_problem(tokenizer, prompt, whole) or _mask_problem(tokenizer, conversation, answer)
            if problem is not None:
                return problem
    return None


def _prefix_problem(tokenizer: Tokenizer, prompt: str, whole: str) -> str | None:
    if not whole.startswith(prompt):
        return (
            f"the chat template rewrites the prompt once an answer follows it: {_shown(prompt)} becomes {_shown(whole)}"
        )
    start, ids = tokenizer.encode(prompt, bos=False), tokenizer.encode(whole, bos=False)
    if ids[: len(start)] != start:
        same = next(i for i, token in enumerate(start) if ids[i : i + 1] != [token])
        return (
            "the chat template ends the prompt inside a token, so that the answer changes the prompt's tokens: "
            f"{_shown(prompt)} ends in the tokens {_spelled(tokenizer, start[same:])}, which become "
            f"{_spelled(tokenizer, ids[same : same + 3])} when the answer follows"
        )
    return None


def _mask_problem(tokenizer: Tokenizer, conversation: Conversation, answer: str) -> str | None:
    ids, mask = tokenizer.encode_example(conversation, answer)
    trained = [token for token, is_trained in zip(ids, mask) if is_trained]
    marked = f"{tokenizer.spell(ids[: len(ids) - len(trained)])}[[{tokenizer.spell(trained)}]]"
    shown = f"the trained part is in [[ ]]: {_shown(marked)}"
    expected = tokenizer.spell(tokenizer.encode(answer, bos=False)).strip()
    if not expected:
        return f"the tokenizer does not give back the text {answer!r}"
    before, match, after = tokenizer.spell(trained[:-1]).strip().partition(expected)
    if not match:
        return f"the chat template changes the answer; {shown}"
    if before:
        between = _shown(before)
        return f"the chat template puts {between} between the prompt and the answer, and it is trained on; {shown}"
    if after:
        kind = "a token that does not stop generation (eos_token_id in generation_config.json can name it)"
        if len(tokenizer.encode(after.strip(), bos=False)) > 1:
            kind = "no token of this vocabulary and is trained on as text"
        return f"the chat template ends the answer with {_shown(after.strip())}, which is {kind}; {shown}"
    return None


def _shown(text: str) -> str:
    return quoted(repr(text), _SHOWN)


def _spelled(tokenizer: Tokenizer, ids: list[int]) -> str:
    return " ".join(repr(tokenizer.spell([i])) for i in ids)
