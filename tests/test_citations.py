"""Every path, and every name of this package, that code or documentation cites is there."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT
from test_imports import modules

SUFFIXES = "py|cpp|h|md|yaml|yml|j2|sh|toml|cff"
PATH = re.compile(rf"(?<![\w./<*{{-])((?:[\w-]+/)*[\w-]+\.(?:{SUFFIXES}))(?![\w/*}}-])")
NAME = re.compile(r"\bprofuser(?:\.\w+)+")
EXAMPLES = {
    "my.yaml",
    "mine.yaml",
    "recipe.yaml",
    "other.yaml",
    "page.md",
    "leaving.py",
    "bench_gpu.md",
    "OUT/bench_gpu.md",
}
"""Files that a user would have, and files that tests and benchmarks write."""
OTHERS = {
    "test_cce_loss_backward.py",
    "test_cce_loss_forward.py",
    "test_fused_linear_cross_entropy.py",
    "compression_config.yaml",
}
"""Files of other projects."""

TREES = ("profuser", "kernels", "csrc", "tests", "benchmarks", "docs")
FILES = sorted(
    path
    for path in [
        *(p for tree in TREES for p in (ROOT / tree).rglob("*")),
        *ROOT.glob("*.md"),
        *ROOT.glob("*.yml"),
        ROOT / "Makefile",
    ]
    if path.suffix.lstrip(".") in (*SUFFIXES.split("|"), "") and path.is_file()
    # profuser/kernels is a link to the folder at the top. Results quote the commands and names of their own day.
    if "profuser/kernels" not in str(path) and path.name not in ("results.md", "CHANGELOG.md", "bad_input.md")
)


def prose(path: Path) -> str:
    """What a person reads in a file: the comments and docstrings of a Python file, and all of any other file."""
    text = path.read_text()
    if path.suffix != ".py":
        return text
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join(t.string for t in tokens if t.type == tokenize.COMMENT or t.string.startswith(('"""', 'r"""')))


def is_there(cited: str, by: Path) -> bool:
    places = (ROOT, ROOT / "profuser", by.parent, ROOT / "docs")
    if any((place / cited).exists() for place in places):
        return True
    return "/" not in cited and any(path.name == cited for path in FILES)


def resolves(name: str) -> bool:
    """Whether a dotted name is a module of the package, or something that one of its modules defines."""
    known = modules()
    parts = name.split(".")
    if parts[1] in ("_align", "_rows", "COMMAND"):  # the C++ extensions, and what stands for any of the commands
        return True
    for cut in range(len(parts), 1, -1):
        if (module := ".".join(parts[:cut])) in known:
            rest = parts[cut:]
            source = known[module].read_text()
            return (
                not rest or re.search(rf"^\s*(?:def |class |async def )?{rest[0]}\b", source, re.MULTILINE) is not None
            )
    return name == "profuser.kernels"


def missing(path: Path) -> list[str]:
    """What a file cites that is not there."""
    text = prose(path)
    files = [cited for cited in set(PATH.findall(text)) - EXAMPLES - OTHERS if not is_there(cited, path)]
    return sorted([*files, *(name for name in set(NAME.findall(text)) if not resolves(name))])


@pytest.mark.parametrize("tree", [*TREES, "."])
def test_what_is_cited_is_there(tree):
    files = [path for path in FILES if path.is_relative_to(ROOT / tree) and (tree != "." or path.parent == ROOT)]
    assert files
    assert not {str(path.relative_to(ROOT)): names for path in files if (names := missing(path))}
