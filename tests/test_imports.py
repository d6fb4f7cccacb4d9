"""Imports point one way: the rooms of the package stand on floors, and a room imports only from the floors below its own.

A room is a folder in profuser/, or a module beside these folders. The front doors of the commands, their __main__.py, are
together a room of their own. Imports inside functions count, too.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = (
    ("errors", "kernels", "owned_memory", "ragged", "disk_list", "progress"),
    ("environment", "loss_arguments", "typed", "disk_table"),
    ("loss",),
    ("recipe", "text", "stopping"),
    ("models", "store"),
    ("alignment", "fusion_model"),
    ("prepare", "train"),
    ("report", "merge", "generate", "plan"),
    ("evaluate",),
    ("doctor", "pipeline", "cli"),
    ("demo",),
    ("experiments",),
    ("front doors",),
)
"""The floors from the ground up. Rooms of one floor do not import each other: prepare and train meet only in a store."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

Arrow = tuple[str, str]
"""A module, and a module that it imports, by their full names."""


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for path in [*ROOT.glob("profuser/**/*.py"), *ROOT.glob("kernels/*.py")]:
        if path.is_relative_to(ROOT / "profuser/kernels"):  # this is the link to the folder at the top
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = ("profuser", *parts) if parts[0] == "kernels" else parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """The full names of all that a module imports, be it modules or what they contain."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            module = ".".join([*package, *(node.module or "").split(".")]).strip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@functools.cache
def arrows() -> set[Arrow]:
    """All imports among the package's own modules. The package itself is left out, because it imports on demand."""
    known = modules()
    return {
        (name, other)
        for name, path in known.items()
        for other in imported(name, path)
        if other in known and "profuser" not in (name, other)
    }


def room(module: str) -> str:
    parts = module.split(".")
    return "front doors" if parts[-1] == "__main__" else parts[1]


def points_up(arrow: Arrow) -> bool:
    """Whether an import leads to another room that is not on a lower floor."""
    inside, outside = map(room, arrow)
    return inside != outside and FLOOR_OF[outside] >= FLOOR_OF[inside]


def test_every_room_stands_on_a_floor():
    assert {room(name) for name in modules() if name != "profuser"} == set(FLOOR_OF)


def test_imports_point_downwards():
    assert not sorted(filter(points_up, arrows()))


def test_an_arrow_that_is_turned_round_is_noticed():
    crossing = [(a, b) for a, b in arrows() if room(a) != room(b)]
    assert len(crossing) > 100
    assert all(points_up((b, a)) for a, b in crossing)


def test_no_modules_import_each_other_in_a_circle():
    of: dict[str, set[str]] = {}
    for a, b in arrows():
        of.setdefault(a, set()).add(b)
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(of.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(of):
        visit(module, ())


@pytest.mark.parametrize("module", ["profuser.loss", "profuser.fusion_model", "profuser.kernels.source_topk"])
def test_the_drop_ins_know_nothing_of_recipes_and_stores(module):
    of: dict[str, set[str]] = {}
    for a, b in arrows():
        of.setdefault(a, set()).add(b)
    reached, waiting = set(), [module]
    while waiting:
        waiting.extend(of.get(waiting.pop(), set()) - reached)
        reached.update(waiting)
    assert not {room(name) for name in reached} & {"recipe", "store", "text", "alignment", "prepare", "train"}


TRAIN_EXTRA = (
    "accelerate", "datasets", "jsonargparse", "matplotlib", "pandas", "psutil", "pyarrow", "rapidfuzz", "requests",
)  # fmt: skip
"""The packages that `profuser[train]` brings, except those that torch and transformers need as well: PyYAML, tqdm."""


def run_without_the_train_extra(code: str) -> subprocess.CompletedProcess:
    """Runs a program in a process in which the packages of TRAIN_EXTRA cannot be imported."""
    program = f"import sys; sys.modules.update(dict.fromkeys({TRAIN_EXTRA}))\n{textwrap.dedent(code)}"
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_loss_imports_nothing_but_torch_and_the_other_public_names_need_no_train_extra():
    result = run_without_the_train_extra("""
        from profuser import IGNORE_INDEX, FusedLinearFusionLoss, fused_linear_fusion_loss, source_topk
        assert "transformers" not in sys.modules
        print(sorted(m for m in sys.modules if m.startswith("profuser.")))

        import profuser
        from profuser import __all__ as names
        for name in names:
            assert getattr(profuser, name) is not None, name
    """)
    assert result.returncode == 0, result.stderr
    assert all(word not in result.stdout for word in ("recipe", "store", "text", "models", "alignment"))


@pytest.mark.parametrize("command", ["train", "prepare", "report", "doctor"])
def test_a_command_on_a_light_install_names_the_extra(command):
    arguments = {"report": [str(ROOT)], "doctor": ["--config", "profuser/recipes/demo.yaml"]}.get(command, [])
    result = run_without_the_train_extra(f"""
        sys.argv = ["profuser", {command!r}, *{arguments!r}]
        from profuser.cli import main
        main()
    """)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert "pip install 'profuser[train]'" in result.stderr


def test_the_package_lists_its_public_names():
    import profuser

    assert set(profuser.__all__) <= set(dir(profuser))
    with pytest.raises(AttributeError, match="no attribute 'fuse'"):
        profuser.fuse  # noqa: B018
