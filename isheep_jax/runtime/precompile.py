"""Compiles the programs of a run before they are called: which ones its stages need, and on several threads.

`_Needs` follows the stages: what each completes, scores or embeds, after which shared prefix. What depends on texts,
such as an evaluation's prompts, is compiled when it is met.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import jax

from isheep_jax.config import Config
from isheep_jax.decode.lowering import DecodingPrograms, Program
from isheep_jax.decode.tokenization import shared_tokens
from isheep_jax.errors import UserError
from isheep_jax.loop.judging.comparisons import CHOICES
from isheep_jax.loop.judging.scores import NUMBERS, criteria_of
from isheep_jax.loop.prompting import similar, topics
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.selection.rules import needs_clusters
from isheep_jax.loop.stages.table import templates_of
from isheep_jax.runtime.compilations import compilations
from isheep_jax.text.tokenizer import Tokenizer

# Programs that are compiled at the same time. Each takes several cores and some GB of the host's memory.
_THREADS = 8
# Readings that look at the log-probabilities of responses after prompts without a shared prefix.
_OF_TEXTS = frozenset({"likelihood", "ending", "lift"})


@dataclass(frozen=True)
class Result:
    """What `compile_all` did.

    programs: how many there were. compiled, cached: how many of them and of their parts were compiled, and how many
    were in the cache. seconds: wall time.
    """

    programs: int
    compiled: int
    cached: int
    seconds: float


@dataclass(frozen=True)
class StageModel:
    """A model whose programs are compiled ahead."""

    programs: DecodingPrograms
    tokenizer: Tokenizer


def stage_programs(config: Config, writer: StageModel, judge: StageModel | None) -> list[Program]:
    """Returns the programs that decode and score in the stages of a run's iterations, each once.

    Args:
        config: settings of the run.
        writer: the run's model.
        judge: the model that judges; None: a server does.
    """
    needs = _Needs(config, writer)
    own = [*needs.synthesize(), *needs.respond()]
    judging = [] if judge is None else list(_Needs(config, judge).assess())
    if judge is writer:
        return _once([*own, *judging, *needs.others()])
    return _once(own) + _once(judging) + _once(needs.others())


def _once(programs: Iterable[Program]) -> list[Program]:
    return list({program.name: program for program in programs}.values())


class _Needs:
    """What the stages of a run ask of a model."""

    def __init__(self, config: Config, model: StageModel):
        self._config, self._tokenizer, self._model = config, model.tokenizer, model.programs
        self._templates = load(config.prompts, templates_of(config))

    def synthesize(self) -> Iterator[Program]:
        most = self._config.synthesize.max_tokens
        by_method = {
            "few_shot": {"synthesize": most},
            "topics": {"topics": topics.MAX_TOKENS, "guided": most, "synthesize": most},
            "retrieved": {"retrieved": most},
        }
        for template, tokens in by_method[self._config.synthesize.method].items():
            yield from self._generate(template, tokens)

    def respond(self) -> Iterator[Program]:
        method, most = self._config.respond.method, self._config.respond.max_tokens
        if method == "zero_shot":
            yield from self._model.generate(0, most)
        else:
            yield from self._generate(method, most)

    def assess(self) -> Iterator[Program]:
        assess = self._config.assess
        roles = {"text": {None}, "chat": {"user"}, "auto": {None, "user"}}[assess.framing]
        for template in criteria_of(assess).values():
            for role in roles:
                if assess.read == "expected":
                    yield from self._choices(template, NUMBERS, role)
                else:
                    yield from self._generate(template, assess.max_tokens, role)
        if _OF_TEXTS & set(assess.readings):
            yield from self._model.texts(0)
        for role in roles:
            if "backward_lift" in assess.readings:
                yield from self._model.texts(self._shared("backward", role))
            if "pairwise" in assess.readings:
                yield from self._choices("pairwise", CHOICES, role)

    def others(self) -> Iterator[Program]:
        config = self._config
        if needs_clusters(config) or similar.is_used(config):
            yield from self._model.embed()
        if config.synthesize.turns == 2:
            yield from self._generate("follow_up", config.synthesize.max_tokens)
        if config.clone.enabled:
            yield from self._generate("thorough", config.clone.max_tokens, "user")

    def _generate(self, template: str, tokens: int, role: str | None = None) -> Iterator[Program]:
        return self._model.generate(self._shared(template, role), tokens)

    def _choices(self, template: str, choices: tuple[str, ...], role: str | None) -> Iterator[Program]:
        long = any(len(tokens) > 1 for tokens in self._tokenizer.encode_choices("Score:", choices))
        return self._model.choices(self._shared(template, role), len(choices), long=long)

    def _shared(self, template: str, role: str | None) -> int:
        return shared_tokens(self._tokenizer, self._templates.prefix(template), role)


def compile_all(programs: Iterable[Program], on_program: Callable[[str], None] = lambda name: None) -> Result:
    """Compiles programs side by side, and waits for all.

    Every process of a cluster calls this with the same programs. They are begun in their order, so that processes that
    share the work of compiling, as on GPUs, are always at work on the first that is not done.

    on_program: is called with the name of each that is done, in their order.
    Raises `UserError` for a program that does not fit into the memory of the devices.
    """
    begun, before = time.monotonic(), compilations()
    count = 0
    with compiling(programs) as futures:
        for program, future in futures:
            try:
                future.result()
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise UserError(
                    f'--precompile: "{program.name}" does not fit into the memory of a device; '
                    "python -m isheep_jax.plan --fit with the same settings finds some that do"
                ) from error
            on_program(program.name)
            count += 1
    new = compilations() - before
    return Result(count, new.compiled.total(), new.cached.total(), time.monotonic() - begun)


@contextlib.contextmanager
def compiling(programs: Iterable[Program]) -> Iterator[list[tuple[Program, Future]]]:
    """Compiles programs on other threads while the context is at work; its end waits for them.

    Where one fails, so will its call, if there is any. Where the context fails, no further one is begun.
    """
    threads = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "isheep_jax compiling")
    futures = [(program, threads.submit(program.compile)) for program in programs]
    try:
        yield futures
    except BaseException:
        threads.shutdown(wait=False, cancel_futures=True)
        raise
    threads.shutdown()
