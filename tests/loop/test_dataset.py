import subprocess
import sys
from pathlib import Path

from isheep_jax.loop.dataset import write_dataset
from isheep_jax.loop.records import KEPT, Selected

HERE = Path(__file__).parent
RECORDS = [
    Selected(f"1-{n:06d}-0", f"1-{n:06d}", f"Count to {n}.", "", "one two", 6.5, None, 6.5, None, "1", KEPT)
    for n in range(1, 4)
]


def test_the_same_records_give_the_same_bytes_in_every_process(tmp_path):
    write_dataset(tmp_path / "here", RECORDS)
    program = (
        f"import pathlib, sys\nsys.path += [{str(HERE)!r}, {str(HERE.parent.parent)!r}]\n"
        "import test_dataset as t\nt.write_dataset(pathlib.Path(sys.argv[1]), t.RECORDS)"
    )
    for name in ("there", "elsewhere"):
        subprocess.run([sys.executable, "-c", program, tmp_path / name], check=True)
    here, there, elsewhere = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("here", "there", "elsewhere")
    )
    assert here == there == elsewhere
