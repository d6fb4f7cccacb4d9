"""Every code block of the README and of docs/ is run, or checked as far as a test may go.

Python code is run, and recipes are parsed. The command of a shell line must exist and take the arguments; if it is quick, it is
run. A comment above a block says what is special about it: `continues` (it goes on from the block before), `needs PACKAGE`,
`needs network`, or `printed by COMMAND`.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT
from torch.distributed.run import get_args_parser

from profuser.cli import COMMANDS
from profuser.evaluate.terminal import score_table
from profuser.merge.settings import METHODS, read_settings
from profuser.recipe import reference
from profuser.recipe.parse import parse_run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?:^<!-- ([^\n]*?) -->\n)?^```([a-z]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    page: str
    number: int
    marks: str
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}-{self.language}"


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for number, (marks, language, code) in enumerate(FENCE.findall(page.read_text())):
            found.append(Block(page.name, number, marks, language, code))
    return found


BLOCKS = blocks()


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def run_python(code: str, names: dict) -> dict:
    exec(compile(code, "a page", "exec"), names)
    return names


def names_before(block: Block) -> dict:
    """The names that are defined by the blocks which this one continues."""
    if "continues" not in block.marks:
        return {}
    before = [b for b in of("python") if b.page == block.page and b.number < block.number][-1]
    return run_python(before.code, names_before(before))


def test_every_block_says_what_it_is():
    assert {block.language for block in BLOCKS} <= {"python", "diff", "yaml", "bash", "text"}
    assert all(block.marks.startswith(("printed by", "tree")) for block in of("text"))


def test_the_tree_of_the_readme_names_what_there_is():
    (tree,) = (block for block in of("text") if block.marks == "tree")
    folder = ROOT
    for line in tree.code.splitlines():
        if line and not line.startswith(" "):
            folder = ROOT / line.split()[0]
            names = [word for word in line.split() if word.endswith("/")]
            assert all((ROOT / name).is_dir() for name in names), line
        for name in re.findall(r"[\w*]+\.py|(?<= )[a-z]+/", line):
            assert list(folder.rglob(name.rstrip("/"))) or list(ROOT.glob(name.rstrip("/"))), name


@pytest.mark.parametrize("block", of("python"), ids=str)
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"needs (\w+)", block.marks):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the snippet needs {package}, which is not installed")
    run_python(block.code, names_before(block))


def test_the_diff_of_a_loop_changes_few_lines_and_no_number():
    (diff,) = of("diff")
    lines = diff.code.splitlines()
    assert sum(line.startswith("+") for line in lines) <= 5
    losses, weights = [], []
    for removed in "+-":
        torch.manual_seed(0)
        names = run_python("\n".join(line[1:] for line in lines if not line.startswith(removed)), {})
        losses.append(names["loss"].detach())
        weights.append(dict(names["model"].named_parameters()))
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    # AdamW divides by the gradient's size. If that is tiny, its rounding moves a weight by a part of the learning rate.
    torch.testing.assert_close(*weights, rtol=1e-5, atol=5e-5)


def recipe_of(block: Block) -> dict:
    content = yaml.safe_load(block.code)
    demo = yaml.safe_load((ROOT / "profuser/recipes/demo.yaml").read_text())
    return content if "sources" in content else demo | content


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_a_recipe_is_understood(block, tmp_path):
    path = tmp_path / "my.yaml"
    if "merge_method" in block.code:
        path.write_text(block.code)
        assert read_settings(path).method in METHODS
        return
    if "output_type" in block.code:
        from profuser.evaluate.tasks import select

        (tmp_path / "my.jsonl").write_text('{"prompt": "How does a bozun taste?", "response": "bitter"}\n')
        path.write_text(block.code.replace("my.jsonl", str(tmp_path / "my.jsonl")))
        assert [benchmark.name for benchmark in select([str(path)])[0]] == ["my_task"]
        return
    path.write_text(yaml.safe_dump(recipe_of(block)))
    assert parse_run("train", ["--config", str(path)]).name == "my"


def shell_lines() -> list[tuple[Block, str]]:
    return [
        (block, line.partition("  #")[0].strip())
        for block in of("bash")
        for line in block.code.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]


@pytest.mark.parametrize(("block", "line"), shell_lines(), ids=lambda x: str(x).replace("/", "|"))
def test_a_shell_line_names_a_command_that_exists_and_takes_its_arguments(block, line, tmp_path, monkeypatch):
    words = shlex.split(re.sub(r"\[(.*?)\]", r"\1", line) if "pip" not in line else line)
    words = [word.removeprefix(".venv/bin/") for word in words if "=" not in word.split("/")[0] or word.startswith("-")]
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "pip" or words[:3] == ["python", "-m", "pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = re.findall(r"\[([\w,]+)\]", line)
        assert all(name in extras for names in asked for name in names.split(","))
    elif words[0] == "profuser" or words[:2] == ["python", "-m"]:
        command, arguments = (f"profuser.{words[1]}", words[2:]) if words[0] == "profuser" else (words[2], words[3:])
        check_module(command, arguments, block, tmp_path, monkeypatch)
    elif words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        assert launched.module
        check_module(launched.training_script, launched.training_script_args, block, tmp_path, monkeypatch)
    elif words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        assert launched.module
        assert (ROOT / launched.config_file).exists()
        check_module(launched.training_script, launched.training_script_args, block, tmp_path, monkeypatch)
    elif words[0] in ("pytest", "bash"):
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word and not word.startswith("-"))
    else:
        pytest.fail(f"no rule for {line!r}")


def check_module(module: str, arguments: list[str], block: Block, tmp_path: Path, monkeypatch) -> None:
    """Checks that a module can be run and that a command takes these arguments. The doctor is quick without --sources, so it is run."""
    assert importlib.util.find_spec(module) is not None
    if module in ("profuser.train", "profuser.prepare"):
        arguments = [a for a in arguments if a != "--fresh"]
        for name in [a for a in arguments if a == "my.yaml"]:
            recipe = next(b for b in of("yaml") if b.page in (block.page, "models.md"))
            (tmp_path / name).write_text(recipe.code)
        monkeypatch.chdir(tmp_path if "my.yaml" in arguments else ROOT)
        if module == "profuser.train":
            importlib.import_module("profuser.train.__main__").run_of(arguments)
        else:
            parse_run("prepare", arguments)
    elif (
        module in ("profuser.generate", "profuser.merge", "profuser.evaluate", "profuser.report", "profuser.store")
        or "--sources" in arguments
    ):
        importlib.import_module(f"{module}.__main__").arguments(arguments)
    elif module == "profuser.doctor":
        (tmp_path / "FILE").write_text("A bozun is a stone.\n")
        places = {"TARGET": "demo:guardian", "SOURCE": "demo:scholar", "FILE": str(tmp_path / "FILE")}
        monkeypatch.chdir(ROOT)
        importlib.import_module(f"{module}.__main__").main([places.get(a, a) for a in arguments])
    elif module.startswith("profuser.") and module.removeprefix("profuser.") in COMMANDS:
        assert all(word.isupper() or word in ("info", "verify") or "/" in word for word in arguments)


def test_the_printed_table_of_the_readme_is_that_of_a_run():
    """benchmarks/results/demo_run.json is the scores.json of the run that the README shows."""
    (table,) = (block for block in of("text") if block.marks == "printed by make train")
    assert table.code.rstrip("\n") == score_table(json.loads((ROOT / "benchmarks/results/demo_run.json").read_text()))


def test_the_recipe_page_is_what_the_dataclasses_say():
    assert (ROOT / "docs/recipe.md").read_text() == reference.page()
    assert all(key.text for group in reference.groups() for key in group.keys if key.kind != "mapping")


def test_the_commands_page_and_the_help_know_the_same_commands():
    page = (ROOT / "docs/commands.md").read_text()
    assert set(re.findall(r"`profuser ([a-z]+)", page)) == set(COMMANDS)
    assert all((ROOT / "profuser" / name / "__main__.py").exists() for name in COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_comes_at_once(command):
    """A command reads its command line before it imports torch, so the help does not wait for that import."""
    program = f"""
import sys, time
begin = time.perf_counter()
sys.argv = ["profuser", {command!r}, "--help"] if {command!r} else ["profuser", "--help"]
from profuser.cli import main
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
