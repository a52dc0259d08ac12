"""Imports go one way: between rooms as docs/architecture.md prints their order, and never in a circle of modules."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "isheep_jax"


def module_name(path: Path) -> str:
    """Returns "decode.engine" for isheep_jax/decode/engine.py, and "decode" for the room itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports, also inside functions and under TYPE_CHECKING."""
    return {name: set(imported(ast.parse(path.read_text()), name)) for name, path in MODULES.items()}


def imported(tree: ast.AST, importer: str):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{importer}: a relative import"
            # "from isheep_jax.decode import cache" imports a module, "from isheep_jax.errors import UserError" a name.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "isheep_jax":
                module = rest if rest in MODULES else rest.rpartition(".")[0]
                assert module in MODULES, f"{importer} imports {name}, which does not exist"
                yield module


def room(module: str) -> str:
    return module.partition(".")[0]


@cache
def order() -> list[list[str]]:
    """The floors of docs/architecture.md, lowest first: rooms and single modules that do not import each other."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    (block,) = re.findall(r"```rooms\n(.*?)```", text, flags=re.DOTALL)
    return [line.split() for line in block.splitlines()]


def floors() -> dict[str, int]:
    return {name: number for number, names in enumerate(order()) for name in names}


def test_documented_order_has_every_room_once():
    names = [name for floor in order() for name in floor]
    assert sorted(names) == sorted({room(module) for module in MODULES} - {""})


def is_command(module: str) -> bool:
    return '__name__ == "__main__"' in MODULES[module].read_text()


def test_rooms_import_only_lower_floors():
    floor = floors()
    upward = [
        f"{importer} -> {module}"
        for importer, modules in imports().items()
        for module in modules
        if importer and room(importer) != room(module) and floor[room(module)] >= floor[room(importer)]
        # A command may lie in the room whose work it does.
        if not (is_command(importer) and room(module) == "cli")
    ]
    assert upward == []


def test_no_circle_of_modules():
    finished, path = set(), []

    def visit(module: str) -> None:
        if module in path:
            pytest.fail("circle of imports: " + " -> ".join([*path[path.index(module) :], module]))
        if module not in finished:
            path.append(module)
            for other in sorted(imports()[module] - {module}):
                visit(other)
            finished.add(path.pop())

    for module in MODULES:
        visit(module)


# The loop runs on a scripted model, without arrays on devices, and knows only types and files of other rooms.
LOOP_MAY_IMPORT = {
    "chat_server",
    "config",
    "decode.requests",
    "directory_lock",
    "distributed",
    "errors",
    "files",
    "text_files",
    "sft.examples",
    "text.conversation",
}


def test_loop_imports_only_types_and_files_of_other_rooms():
    foreign = {
        f"{importer} -> {module}"
        for importer, modules in imports().items()
        if room(importer) == "loop"
        for module in modules
        if room(module) != "loop" and module not in LOOP_MAY_IMPORT
    }
    assert foreign == set()


def test_engine_does_not_load_training():
    program = (
        "import sys, isheep_jax.generate, isheep_jax.decode.engine, isheep_jax.runtime.devices, "
        "isheep_jax.runtime.locate, isheep_jax.checkpoint.pretrained\n"
        "loaded = {'grain', 'orbax', 'optax', 'isheep_jax.sft'} & sys.modules.keys()\n"
        "print(sorted(loaded))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout == "[]\n"
