"""The README's Python runs as it stands."""

import importlib.util
import re

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text()
# A comment above a block says when it goes on from the block before, and which package it cannot run without.
BLOCKS = re.findall(r"(?:<!-- (.*?) -->\n)?```python\n(.*?)```", README, re.DOTALL)


def run(code: str, names: dict) -> dict:
    exec(compile(code, "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("block", range(len(BLOCKS)))
def test_every_python_snippet_of_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    marks, code = BLOCKS[block]
    for package in re.findall(r"needs (\w+)", marks):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the README's snippet needs {package}, which is not installed")
    run(code, run(BLOCKS[block - 1][1], {}) if "continues" in marks else {})


def test_the_readmes_diff_changes_few_lines_and_no_number():
    (diff,) = re.findall(r"```diff\n(.*?)```", README, re.DOTALL)
    lines = diff.splitlines()
    assert sum(line.startswith("+") for line in lines) <= 5
    results = []
    for removed in "+-":
        torch.manual_seed(0)
        names = run("\n".join(line[1:] for line in lines if not line.startswith(removed)), {})
        results.append((names["loss"].detach(), dict(names["model"].named_parameters())))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_every_file_that_the_readme_names_exists():
    for name in re.findall(r"`((?:profuser|kernels|docs|csrc|benchmarks|tests)/[\w./-]+)`", README):
        assert (ROOT / name).exists(), name
    modules = set(re.findall(r"(\w+\.py)\b", README.split("## What is where")[1]))
    for module in modules:
        assert list(ROOT.glob(f"profuser/{module}")) or list(ROOT.glob(f"kernels/{module}")), module
