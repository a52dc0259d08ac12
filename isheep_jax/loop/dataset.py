"""The kept pairs of an iteration as a TensorFlow Datasets dataset (ArrayRecord files; TensorFlow is not needed).

builder = tfds.builder_from_directory("runs/NAME/iteration_1/selected/dataset")
source = builder.as_data_source(split="train")
"""

import contextlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from etils import epath

from isheep_jax import distributed
from isheep_jax.errors import UserError
from isheep_jax.files import on_object_store
from isheep_jax.loop.records import Selected

# Examples that are in memory at a time.
_BLOCK = 1024
_DESCRIPTION = (
    "Instruction-response pairs that a language model wrote, scored and selected, in the order of generation."
)


def write_dataset(directory: epath.PathLike, records: Sequence[Selected]) -> None:
    """Writes `directory` on the primary process, on a disk whole or not at all; an earlier dataset there is replaced.

    The same records give the same bytes. Features: id, instruction, input, response (strings), quality and following
    (float32, NaN where there is no score).
    """
    if not distributed.is_primary():
        return
    # Here, not above: it takes most of a second, and not every import of the loop writes a dataset.
    import numpy as np
    import tensorflow_datasets as tfds

    # The library keeps every class of a builder as long as the process lives: it must not hold the records.
    waiting = [records]

    class SelectedPairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        # The library would look for files of the dataset next to this code, for which it needs a package
        # (importlib_resources) that tensorflow-datasets 4.9.10 does not install; there are no such files.
        code_path = None

        def _info(self):
            text, number = tfds.features.Text, np.float32
            features = {"id": text(), "instruction": text(), "input": text(), "response": text()}
            return tfds.core.DatasetInfo(
                builder=self,
                description=_DESCRIPTION,
                features=tfds.features.FeaturesDict({**features, "quality": number, "following": number}),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterable[tuple[int, dict]]:
            for index, record in enumerate(waiting.pop()):
                yield index, _example(record)

    directory = epath.Path(directory)
    try:
        directory.rmtree(missing_ok=True)
        with _building(directory) as building:
            # The library reports its progress on the terminal, which belongs to the run's own report.
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                builder = SelectedPairs(data_dir=building, file_format="array_record")
                builder.download_and_prepare()
            made = Path(builder.data_dir)
            for path in sorted(made.glob("*.array_record*")):
                _sort_fields(path)
            if on_object_store(directory):
                for path in sorted(made.iterdir()):
                    (directory / path.name).write_bytes(path.read_bytes())
            else:
                made.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write {directory}: {error.strerror or error}; the same command goes on") from error


@contextlib.contextmanager
def _building(directory: epath.Path) -> Iterator[Path]:
    """Yields a directory for ArrayRecord files, which need a disk: next to `directory` if that is on one."""
    if on_object_store(directory):
        with tempfile.TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    building = directory.with_name(f".{directory.name}.tmp")
    building.rmtree(missing_ok=True)
    yield Path(building)
    building.rmtree(missing_ok=True)


def _sort_fields(path: Path) -> None:
    """Writes the file's examples again with their fields in order.

    A protocol buffer's map is otherwise written in an order that changes from process to process.
    """
    from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
    from tensorflow_datasets.proto import tf_example_pb2

    ordered = path.with_name(f".{path.name}.tmp")
    reader, writer = ArrayRecordReader(str(path)), ArrayRecordWriter(str(ordered), "group_size:1")
    count = reader.num_records()
    for first in range(0, count, _BLOCK):
        for data in reader.read(first, min(first + _BLOCK, count)):
            writer.write(tf_example_pb2.Example.FromString(data).SerializeToString(deterministic=True))
    reader.close()
    writer.close()
    ordered.replace(path)


def _example(record: Selected) -> dict:
    missing = float("nan")
    return {
        "id": record.id,
        "instruction": record.instruction,
        "input": record.input,
        "response": record.response,
        "quality": missing if record.quality is None else record.quality,
        "following": missing if record.following is None else record.following,
    }
