"""The README's Python runs as it stands."""

import re

from conftest import ROOT


def test_every_python_snippet_of_the_readme_runs():
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})


def test_every_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:profuser|kernels|docs|csrc|benchmarks|tests)/[\w./-]+)`", text):
        assert (ROOT / name).exists(), name
    modules = set(re.findall(r"(\w+\.py)\b", text.split("## What is where")[1]))
    for module in modules:
        assert list(ROOT.glob(f"profuser/{module}")) or list(ROOT.glob(f"kernels/{module}")), module
