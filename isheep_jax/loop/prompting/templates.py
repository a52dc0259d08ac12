"""Prompt templates: text files that the user can edit without touching code.

A set of templates is a directory with

    synthesize.jinja   shows `examples` (instruction, input, output of each) and asks for more tasks
    quality.jinja      shows `instruction`, `input`, `response` and asks for a score from 1 to 10
    following.jinja    the same for the other criterion
    seeds.jsonl        the seed tasks of `synthesize.seeds=builtin`

and, for the settings that need them,

    quality_simple.jinja, following_simple.jinja, joint.jinja, few_shot.jinja   the other prompts of `assess.prompt`
    follow_up.jinja    shows `instruction`, `input`, `response` and asks what the user says next (`synthesize.turns=2`)
    topics.jinja       shows a `type` of question, a `question` of it and `topics`, and asks for more topics
    guided.jinja       shows `examples` (type, topic, instruction of each) and `hints` (type, topic), and asks for an
                       instruction per hint, each after "(type; topic)" on a line of its own
    topics.jsonl       the types, with a topic and a question each (these three for `synthesize.method=topics`)
    principles.jinja   shows `instruction`, `input` after rules of good answers and conversations with thoughts
    principles.json    how these conversations are marked (both for `respond.method=principles`)
    retrieved.jinja    shows `examples` (question, answer) and asks for one more question or, where there is a
                       `question`, for its answer (`synthesize.method` and `respond.method` retrieved)
    backward.jinja     shows a `response` ("" for none) and asks for its instruction (the reading backward_lift)
    pairwise.jinja     shows `instruction`, `input`, the responses `first` and `second` and asks which is better, A or B
                       (the reading pairwise)
    thorough.jinja     shows `instruction`, `input` and asks for an extensive answer (`clone.enabled`); a user's message

and next to them

    damages.json       optional: texts of bad answers for the check of the judge (`loop/judging/damages.py`)
    format.json        optional: synthesize_stop, strings that end a completion

Prompts are plain text to be continued; line breaks at their end are cut, so that the model's first token is its own.
For a judge that is asked in a user's turn (`assess.framing`) the last line is what the assistant begins with.
"""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import jinja2.meta
from etils import epath
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isheep_jax.errors import UserError
from isheep_jax.loop.filters.labels import NO_INPUT
from isheep_jax.text_files import read_object

# A private-use character that occurs in no prompt: it stands for the value of a variable.
MARK = "\ue000"

STANDARD = ("synthesize", "quality", "following")

# Files that a template needs next to it.
_BESIDE = {"topics": "topics.jsonl", "principles": "principles.json"}


class _AnyValue(str):
    """Stands for the value of any variable: a text, a record with any field, or a list of one of them."""

    def __getattr__(self, name: str) -> "_AnyValue":
        if name.startswith("__"):  # protocols such as __html__, which a text does not have
            raise AttributeError(name)
        return self

    def __getitem__(self, key: object) -> "_AnyValue":
        return self

    def __iter__(self) -> Iterator["_AnyValue"]:
        return iter([self])

    __reversed__ = __iter__


class Templates:
    """The prompt templates of a run, as read by `load`."""

    def __init__(self, directory: Path, names: Sequence[str] = STANDARD):
        self.directory = directory
        self._files = (*(f"{name}.jinja" for name in names), *(_BESIDE[name] for name in names if name in _BESIDE))
        needed = (*self._files, "seeds.jsonl")
        for name in needed:
            if not (directory / name).is_file():
                raise UserError(f"prompts: {directory} has no {name}; these settings need {', '.join(needed)}")
        self._environment = ImmutableSandboxedEnvironment(
            loader=jinja2.FileSystemLoader(directory, encoding="utf-8-sig"),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
        )
        self._environment.globals["no_input"] = NO_INPUT
        self._templates = {}
        self._prefixes: dict[str, str] = {}
        for name in names:
            try:
                self._templates[name] = self._environment.get_template(f"{name}.jinja")
            except (jinja2.TemplateSyntaxError, UnicodeDecodeError) as error:
                line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
                raise UserError(f"prompts: {directory / name}.jinja{line}: {error}") from error
        self.synthesize_stop = _read_format(directory / "format.json")

    def seeds_file(self, setting: str) -> epath.Path:
        """Returns the file that a value of `synthesize.seeds` names."""
        builtin, colon, name = setting.partition(":")
        if builtin == "builtin" and name.isidentifier() == bool(colon):
            return epath.Path(self.directory / f"{name or 'seeds'}.jsonl")
        return epath.Path(setting)

    def render(self, name: str, **variables: object) -> str:
        """Returns the text of a template without the line breaks at its end.

        Raises UserError where the template has a variable that is not given.
        """
        try:
            return self._templates[name].render(**variables).rstrip("\n")
        except jinja2.TemplateError as error:
            raise UserError(f"prompts: {self.directory / name}.jinja: {error}") from error

    def prefix(self, name: str) -> str:
        """Returns the text that all prompts of a template begin with: everything before its first variable.

        It is empty for a template that does with a variable what needs its real value. Decoding shares a prefix only
        between prompts that do begin with it.
        """
        if name not in self._prefixes:
            try:
                given = dict.fromkeys(self._variables(f"{name}.jinja"), _AnyValue(MARK))
                self._prefixes[name] = self._templates[name].render(**given).partition(MARK)[0]
            except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError):
                self._prefixes[name] = ""
        return self._prefixes[name]

    def _variables(self, file: str) -> set[str]:
        """Returns the names of the variables of a template and of those that it includes."""
        tree = self._environment.parse(self._environment.loader.get_source(self._environment, file)[0])
        included = [other for other in jinja2.meta.find_referenced_templates(tree) if other is not None]
        names = jinja2.meta.find_undeclared_variables(tree) - self._environment.globals.keys()
        return names.union(*map(self._variables, included))

    def digests(self) -> dict[str, str]:
        """Returns the sha256 of each file that the prompts depend on."""
        names = [n for n in (*self._files, "format.json") if (self.directory / n).is_file()]
        return {f"prompts/{n}": hashlib.sha256((self.directory / n).read_bytes()).hexdigest() for n in names}


def load(name: str, names: Sequence[str] = STANDARD) -> Templates:
    """Reads the named templates of 'standard', 'tiny' or a directory. Raises UserError for missing ones."""
    package = Path(__file__).parents[2]
    builtin = {"standard": package / "loop" / "prompts" / "standard", "tiny": package / "tiny" / "prompts"}
    directory = builtin.get(name, Path(name))
    if not directory.is_dir():
        raise UserError(f"prompts: there is no directory {name}; use 'standard', 'tiny' or a directory of templates")
    return Templates(directory, names)


def _read_format(path: Path) -> tuple[str, ...]:
    if not path.exists():
        return ()
    like = '{"synthesize_stop": ["..."]}'
    values = read_object(path, "prompts", like)
    stop = values.pop("synthesize_stop", [])
    if values or not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
        raise UserError(f"prompts: {path} should be like {like}")
    return tuple(stop)
