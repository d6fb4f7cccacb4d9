"""Text is UTF-8 whatever the locale: every call that opens one names its encoding."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

FILES = sorted([*ROOT.glob("profuser/**/*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("benchmarks/*.py")])


def without_encoding(source: str) -> Iterator[int]:
    """The lines of calls that open a text without naming its encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        words = {keyword.arg for keyword in node.keywords}
        given = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        if called in ("read_text", "write_text"):
            encodings = 1 if called == "read_text" else 2
            if "encoding" not in words and len(node.args) < encodings:
                yield node.lineno
        elif isinstance(node.func, ast.Name) and called == "open":
            if "encoding" not in words and not any("b" in mode for mode in given[-1:]):
                yield node.lineno
        elif called == "open" and given[:1] and set(given[0]) <= set("rwaxt+") and "encoding" not in words:
            yield node.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("open('x')", [1]),
        ("open('x', 'rb')", []),
        ("open(p, 'w', encoding='utf-8')", []),
        ("p.read_text()", [1]),
        ("p.read_text('utf-8')", []),
        ("p.write_text(t)\np.write_text(t, encoding='utf-8')", [1]),
        ("p.open('w')", [1]),
    ],
)
def test_a_call_without_its_encoding_is_found(source, lines):
    assert list(without_encoding(source)) == lines


def test_every_text_is_opened_with_its_encoding():
    found = [f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in without_encoding(path.read_text("utf-8"))]
    assert not found


def test_the_files_are_seen():
    assert Path(ROOT / "profuser/train/loop.py") in FILES
