"""The loop's `Backend` on JAX: loads models for decoding and scoring, and fine-tunes new ones."""

import contextlib
import dataclasses
import functools
import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from etils import epath

from isheep_jax import distributed
from isheep_jax.checkpoint.adapter_config import is_adapter, read_base
from isheep_jax.checkpoint.kept_rows import KeptRows
from isheep_jax.checkpoint.pretrained import Pretrained, model_files, open_model, weights_digest
from isheep_jax.config import Config, is_server
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.loaded import nominal_shape
from isheep_jax.decode.lowering import DecodingPrograms, Program
from isheep_jax.errors import UserError
from isheep_jax.files import is_there
from isheep_jax.loop import made_models
from isheep_jax.loop.protocols import FineTuneJob, StageReporter
from isheep_jax.loop.run_directory import COMPILED, check_unused
from isheep_jax.model.architecture import parameter_count, parameter_table
from isheep_jax.runtime import precompile
from isheep_jax.runtime.decoding import decoding_facts
from isheep_jax.runtime.devices import default_backend, describe_devices, use_compilation_cache
from isheep_jax.runtime.fine_tune import adapter_base, train_and_save
from isheep_jax.runtime.host_memory import KEPT_SHARE, free_host_memory
from isheep_jax.runtime.locate import locate_evaluation_judge, locate_judge, locate_model
from isheep_jax.runtime.meter import Meter
from isheep_jax.runtime.opening import IN_RUN
from isheep_jax.runtime.precompile import StageModel
from isheep_jax.runtime.vector_index import Index
from isheep_jax.sft.lowering import training_programs
from isheep_jax.sft.trainer import check_settings
from isheep_jax.sharding import DECODE_RULES, check_divisible, decode_mesh, make_mesh, platform_of

# Metrics of an update that are shown next to the progress.
SHOWN_METRICS = ("loss", "validation_loss")


class JaxBackend:
    """The `Backend` of the loop. Holds the weights of one model at a time.

    Raises `UserError` when the model directory is not valid, the mesh does not fit the devices or the model, or the
    run's directory holds something else.
    """

    def __init__(self, config: Config, *, weights: bool = True):
        """Opens the models. weights: whether theirs are there; without them programs can be compiled, and no more."""
        is_new = distributed.from_primary(lambda: _is_new_run(config.directory))
        use_compilation_cache(config.directory / COMPILED)
        self._config = config
        self._base = locate_model(config.model.path, "--model.path")
        model = open_model(self._base, config.model.chat_template, weights=weights)
        model.check_chat()
        # The base judges, is trained on, and is what adapters are merged into: several times in each iteration.
        self._model = dataclasses.replace(model, kept=KeptRows(_memory_for_base()))
        self._architecture = model.architecture
        self._dtype = jnp.dtype(config.model.compute_dtype)
        self._train_mesh = make_mesh(config.mesh)
        self._decode_mesh = decode_mesh(self._train_mesh, config.mesh.decode_tensor)
        check_settings(config.sft, self._architecture, self._train_mesh)
        check_divisible(parameter_table(self._architecture), self._decode_mesh, DECODE_RULES)
        self.decoding = decoding_facts(model, config.decode, self._dtype, config.seed)
        self.judge, self.evaluation_judge = locate_judge(config), locate_evaluation_judge(config.evaluate)
        # Judges may have another architecture than the run's model, and have tokenizers of their own.
        self._judges = {
            directory: self._open_judge(setting, directory, weights)
            for setting, directory in (("assess.judge", self.judge), ("evaluate.judge", self.evaluation_judge))
            if directory not in (None, self._base)
        }
        self._engine: tuple[epath.Path, Engine] | None = None
        self._meter = Meter()
        self._compiled_beside = False
        # A pass over all weights, which each task of an evaluation asks for.
        self._digest_of = functools.cache(weights_digest)
        if distributed.is_distributed():
            judges = {f"the files of {directory}": judge.digest() for directory, judge in self._judges.items()}
            distributed.check_agreement({"the files of --model.path": model.digest(), **judges})
        if is_new and weights:
            # A new run loads the weights now, so that a damaged file or settings that do not fit the model are found
            # before anything is written. A resumed run may need other weights first.
            if config.sft.method == "lora":
                model.check_adapters()
            self.load(None)

    def description(self) -> str:
        """Returns one line for the user about the model and the devices."""
        mesh = " x ".join(f"{size} {axis}" for axis, size in self._train_mesh.shape.items())
        return (
            f"{self._config.model.path} ({self._architecture.family}, "
            f"{_short(parameter_count(self._architecture))} parameters, {self._dtype.name}) on "
            f"{describe_devices(list(self._train_mesh.devices.flat))}, mesh {mesh}"
        )

    def files(self) -> dict[str, epath.Path]:
        models = {"model.path": self._base, "assess.judge": self.judge}
        return {
            f"{setting}/{path.name}": path
            for setting, directory in models.items()
            if directory is not None
            for path in model_files(directory)
        }

    def load(self, directory: epath.Path | None) -> Engine:
        directory = directory or self._base
        if self._engine is None or self._engine[0] != directory:
            self._release()
            begun = time.monotonic()
            # Weights are read from the files even right after training, so that a resumed run has the same ones.
            model = self._opened(directory)
            with self._compiling_beside():
                params = model.load(
                    mesh=self._decode_mesh,
                    rules=DECODE_RULES,
                    dtype=self._dtype,
                    weights_dtype=self._config.decode.weights_dtype,
                )
                engine = Engine(
                    params,
                    model.architecture,
                    model.tokenizer,
                    self._config.decode,
                    mesh=self._decode_mesh,
                    seed=self._config.seed,
                    compute_dtype=self._dtype,
                )
            self._engine = (directory, engine)
            self._meter.take(engine.statistics)
            self._meter.load_seconds += time.monotonic() - begun
        return self._engine[1]

    def meter(self) -> Callable[[], Mapping[str, float]]:
        return self._meter.start()

    def precompile(self, on_program: Callable[[str], None]) -> precompile.Result:
        """Compiles the programs of the run's iterations, for a later start; no weights are needed.

        On a CPU, where the sizes of the others follow from the prompts, these are the decode program of the settings
        and those of the fine-tuning.

        on_program: is called with the name of each.
        Raises `UserError` where the settings leave their sizes to the devices.
        """
        if not self._config.decode.slots:
            raise UserError(
                "--decode.slots: 0 leaves it to the memory of the device; --precompile needs a number, for example "
                "--decode.slots=64"
            )
        if platform_of(self._decode_mesh) == "cpu":
            writer = self._stage_model(self._model)
            programs = [writer.programs.of_settings()]
        else:
            programs = self._decoding_programs()
        training = training_programs(self._architecture, self._config.sft, self._train_mesh, self._dtype)
        programs += [Program(name, lambda lower=lower: lower().compile()) for name, lower in training.items()]
        return precompile.compile_all(programs, on_program)

    def weights_digest(self, directory: epath.Path | None) -> str:
        model = self._opened(directory or self._base)
        return distributed.from_primary(lambda: model.weights_digest(self._digest_of))

    def index(self, vectors: np.ndarray) -> Index:
        return Index(vectors, self._decode_mesh)

    def fine_tune(self, job: FineTuneJob, progress: StageReporter) -> dict:
        self._release()
        result = train_and_save(
            self._opened(job.start or self._base),
            job,
            self._config.sft,
            mesh=self._train_mesh,
            dtype=self._dtype,
            seed=seed_of(self._config.seed, f"{job.iteration}/fine-tune"),
            # Within the run, wherever that is or will be; an export gives the full path.
            base=(
                job.start.relative_to(self._config.directory).as_posix()
                if job.start
                else adapter_base(self._config.model.path, self._base)
            ),
            on_step=lambda step, total, metrics: progress.update(step, total, **_shown(metrics)),
        )
        return dataclasses.asdict(result)

    def write_model(self, adapter: epath.Path, directory: epath.Path, card: str | None) -> None:
        made_models.note_digests(directory, self._opened(adapter).save(directory, card))

    def _opened(self, directory: epath.Path) -> Pretrained:
        """Returns the base, a judge, or a model that the run made, with the tokenizer of the base."""
        known = {**self._judges, self._base: self._model}
        if directory in known:
            return known[directory]
        if not is_adapter(directory):
            return self._model.with_weights(directory)
        base = read_base(directory)
        made = IN_RUN.fullmatch(base)
        if made:
            made_models.check(self._config.directory / base)
        return (self._opened(self._config.directory / base) if made else self._model).with_adapter(directory)

    @contextlib.contextmanager
    def _compiling_beside(self) -> Iterator[None]:
        """Compiles what most prompts need while the context loads weights, in the first one.

        A CPU needs its cores for either, and its programs depend on the prompts.
        """
        if self._compiled_beside or not self._config.decode.slots or platform_of(self._decode_mesh) == "cpu":
            yield
            return
        self._compiled_beside = True
        with precompile.compiling([program for program in self._decoding_programs() if program.usual]):
            yield

    def _decoding_programs(self) -> list[Program]:
        """Returns the programs that decode and score, once it is settled how the weights are stored."""
        writer = self._stage_model(self._model)
        if (judge := self._judges.get(self.judge)) is not None:
            return precompile.stage_programs(self._config, writer, self._stage_model(judge))
        return precompile.stage_programs(self._config, writer, None if is_server(self._config.assess.judge) else writer)

    def _stage_model(self, model: Pretrained) -> StageModel:
        config, shape = nominal_shape(
            model.architecture,
            model.tokenizer,
            self._config.decode,
            mesh=self._decode_mesh,
            compute_dtype=self._dtype,
        )
        programs = DecodingPrograms(shape, config.max_length)
        programs.settle()
        return StageModel(programs, model.tokenizer)

    def _open_judge(self, setting: str, directory: epath.Path, weights: bool) -> Pretrained:
        judge = open_model(directory, weights=weights)
        assess = self._config.assess
        if setting == "assess.judge" and assess.framing != "text" and not judge.tokenizer.has_chat_template:
            raise UserError(f"--assess.framing: {assess.judge} has no chat template, so that it must be text")
        length, limit = self._config.decode.max_length, judge.architecture.context_length
        if length > limit:
            raise UserError(f"--decode.max_length: {length} tokens are more than the {limit} of --{setting}")
        check_divisible(parameter_table(judge.architecture), self._decode_mesh, DECODE_RULES)
        return judge

    def _release(self) -> None:
        # An engine may be part of reference cycles, and two sets of weights would not fit side by side.
        self._engine = None
        self._meter.take(None)
        gc.collect()


def _is_new_run(directory: epath.Path) -> bool:
    """Returns whether no run has begun there. Raises `UserError` where something else is, before minutes are spent."""
    if is_there(directory / "config.json"):
        return False
    if is_there(directory):
        check_unused(directory)
    return True


def _memory_for_base() -> int:
    """Returns how many bytes of the host's memory may hold the base; none where the devices have no other memory."""
    return 0 if default_backend() == "cpu" else int(KEPT_SHARE * free_host_memory())


def seed_of(seed: int, purpose: str) -> int:
    """Returns a 31-bit seed for one purpose of the run, the same on every machine and in every process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:4], "big") >> 1


def _shown(metrics: dict) -> dict:
    return {name: metrics[name] for name in SHOWN_METRICS if name in metrics}


def _short(count: int) -> str:
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:,}"
