"""Keeps text and control tokens apart: nothing that a message says gives the id of a turn marker or its like.

A chat template joins its own markers and the messages to one text, in which both look alike. So the names of control
tokens in the messages are hidden from it: each is replaced by one private-use character that occurs in none of the
texts. Afterwards the parts of the rendered text that hold such characters are tokenized with the names in place and
with control tokens switched off; all other parts are tokenized as ever.
"""

import re
from collections.abc import Sequence

from isheep_jax.text.tokenizer_backends import Backend, Span

# The private-use plane: its characters are in no text but by intent, and those that are there are not taken.
_PRIVATE_USE = range(0xF0000, 0xFFFFE)


class HiddenNames:
    """The characters that stand for the names of control tokens in some texts.

    A text with them in it is called marked below.
    """

    def __init__(self, backend: Backend, texts: Sequence[str]):
        self._backend = backend
        names = sorted({match.group() for text in texts for match in backend.control_names.finditer(text)})
        unused = (chr(i) for i in _PRIVATE_USE if not any(chr(i) in text for text in texts))
        self._characters = dict(zip(names, unused))
        self._names = {character: name for name, character in self._characters.items()}
        self._hidden = re.compile("|".join(map(re.escape, self._names)) or r"(?!)")

    def __bool__(self) -> bool:
        """Returns whether any name is hidden."""
        return bool(self._names)

    @property
    def is_local(self) -> bool:
        """Whether a marked text can be cut before a word, see `Backend`."""
        return not self._names and self._backend.is_local

    def hide(self, text: str) -> str:
        """Returns a text with its names of control tokens hidden."""
        return self._backend.control_names.sub(lambda m: self._characters[m.group()], text) if self._names else text

    def restore(self, marked: str) -> str:
        """Returns a marked text with the names in place."""
        return self._hidden.sub(lambda match: self._names[match.group()], marked)

    def encode(self, marked: str) -> list[int]:
        """Returns the ids of a marked text, without those of hidden names."""
        return self.align(marked)[0] if self._names else self._backend.encode(marked)

    def align(self, marked: str) -> tuple[list[int], list[Span]]:
        """Returns the ids of a marked text, without those of hidden names, and the characters of the restored text."""
        found, spans = self._backend.align(marked)
        if not self._hidden.search(marked):
            return found, spans
        ids: list[int] = []
        moved: list[Span] = []
        begin = at = 0  # of the part that follows a control token, in the marked and in the restored text
        first = 0  # its first token
        ends = [i for i, (token, span) in enumerate(zip(found, spans)) if self._is_control(token, marked, span)]
        for end in (*ends, len(found)):
            part = marked[begin : spans[end][0] if end < len(found) else len(marked)]
            if self._hidden.search(part):
                part_ids, part_spans = self._align_plain(self.restore(part), follows=begin > 0)
            else:
                part_ids, part_spans = found[first:end], [(a - begin, b - begin) for a, b in spans[first:end]]
            ids += part_ids
            moved += [(a + at, b + at) for a, b in part_spans]
            at += len(self.restore(part))
            if end < len(found):
                begin, first = spans[end][1], end + 1
                ids.append(found[end])
                moved.append((at, at + begin - spans[end][0]))
                at = moved[-1][1]
        return ids, moved

    def _is_control(self, token: int, marked: str, span: Span) -> bool:
        # An unknown character gives a special token as well, but not where its name is written.
        name = self._backend.control_ids.get(token)
        return name is not None and name in marked[slice(*span)]

    def _align_plain(self, text: str, follows: bool) -> tuple[list[int], list[Span]]:
        """Aligns a text in which no name is that of a control token. follows: whether another text precedes it."""
        return align_after_text(self._backend.align_plain, text) if follows else self._backend.align_plain(text)


def align_after_text(align, text: str) -> tuple[list[int], list[Span]]:
    """Aligns a text that follows another one, so that no space is inserted before it. align: as of a backend."""
    (line, _), (ids, spans) = align("\n"), align("\n" + text)
    if ids[: len(line)] != line:
        return align(text)
    return ids[len(line) :], [(begin - 1, end - 1) for begin, end in spans[len(line) :]]
