"""Rules that drop malformed instructions and responses before they are scored.

'paper' are the heuristics of I-SHEEP (arXiv 2408.08072 section 3.1 and its released filters). They are made for English
and crude: an answer that names "vitamin A." is dropped as a list of options. 'basic' drops only what no run can use.
Each function returns None or the reason, one of a few fixed strings by which records are counted.
"""

import re

from isheep_jax.loop.filters.labels import line_label
from isheep_jax.loop.filters.verdicts import EMPTY

# Tasks that text alone cannot do.
_BEYOND_TEXT = re.compile(
    r"\b(images?|graphs?|pictures?|files?|maps?|draw|plot|go to|video|audio|music|flowchart|diagram)\b", re.IGNORECASE
)
_NO_INPUT = re.compile(r"<?\bno ?input\b>?", re.IGNORECASE)
_LABEL = re.compile(line_label("instruction|input|output|response") + "|###", re.IGNORECASE)
# A field label that does not start a line.
_LABEL_WITHIN = re.compile(r"\S\s+(Instruction|Input|Output):")
_LINK = re.compile(r"https?:", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"<[^<>\n]{1,20}>")
_ROLE = re.compile(r"(^|\n)(assistant|system|human|question|output|user)\s*(:|\n)", re.IGNORECASE)
_CHOICES = re.compile(r"\banswer\s+choices\s*:", re.IGNORECASE)
_QUESTION_BACK = re.compile(r"(^|\n)can you\b|\bdo you\b", re.IGNORECASE)
_CLOSING_QUESTION = re.compile(r"\n[^\S\n]*\n[^\n?]{1,100}\?")
# Narrower than the authors' pattern, which ignores case and context: "e.g." and c.lower() in a program match there.
_OPTION = re.compile(r"\b[A-E]\.(\s|$)|\([A-Ea-e]\)")
_FOREIGN = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_ANSWER_LABEL = re.compile(r"\s*(答案|回答|答)\s*[:：]\s*")


def instruction_reason(rules: str, instruction: str, input: str) -> str | None:
    """Returns why an instruction is dropped, or None. rules: 'paper', 'strict' (no difference here) or 'basic'."""
    if not re.search(r"\w", instruction):
        return EMPTY
    # The line break lets the first line have a label, too.
    if any(_LABEL.search(f"\n{text}") for text in (instruction, input)):
        return "leftover of the form"
    if rules == "basic":
        return None
    words = len(instruction.split())
    if words <= 3:
        return "too short"
    if words > 150:
        return "too long"
    if _BEYOND_TEXT.search(instruction) or _BEYOND_TEXT.search(input):
        return "needs more than text"
    if not instruction[0].isascii():
        return "not English"
    if not instruction[0].isalnum():
        return "starts with punctuation"
    if _NO_INPUT.search(instruction) or _NO_INPUT.search(input):
        return "leftover of the form"
    if _LABEL_WITHIN.search(instruction) or _LABEL_WITHIN.search(input):
        return "leftover of the form"
    if _LINK.search(instruction) or _LINK.search(input):
        return "has a link"
    return None


def clean_response(rules: str, response: str) -> str:
    """Strips white space around the response and, with 'paper', a leading Chinese label for "answer"."""
    if rules == "paper":
        response = _ANSWER_LABEL.sub("", response, count=1) if _ANSWER_LABEL.match(response) else response
    return response.strip()


def response_reason(rules: str, instruction: str, input: str, response: str) -> str | None:
    """Returns why a response (cleaned, complete) is dropped, or None. rules: 'paper' or 'basic'."""
    if not response.strip():
        return EMPTY
    if rules == "basic":
        return None
    if _ROLE.search(response):
        return "starts a role line"
    if _CHOICES.search(response) or _OPTION.search(response):
        return "answer options"
    if _NO_INPUT.search(response):
        return "leftover of the form"
    if _QUESTION_BACK.search(response) or _CLOSING_QUESTION.search(response):
        return "asks back"
    if _FOREIGN.search(response):
        return "foreign script"
    task = f"{instruction}\n{input}"
    if _NO_INPUT.search(task) or _PLACEHOLDER.search(task) or "none" in task.lower():
        return "instruction has a placeholder"
    if input and input in instruction:
        return "input repeats the instruction"
    return None
