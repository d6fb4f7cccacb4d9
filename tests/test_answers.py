"""The files of `profuser.generate`: what is damaged, foreign or no file is said in one line, and nobody's file is lost."""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_runs import run

from profuser.cli import explained
from profuser.errors import DataError, OutOfMemoryError
from profuser.generate.answers import answer_file, finished_rows, settings_key
from profuser.generate.decoder import Decoder
from profuser.generate.prompts import prompts_of
from profuser.generate.steps import Answer
from profuser.recipe.parse import parse_run
from profuser.recipe.places import resolve
from profuser.store.files import DiskFull

PROMPTS = ["one", "zwei \u2028 \x85 \x0c", "三"]
RECIPE = """\
sources: [{ name: guardian, model: "demo:guardian" }, { name: scholar, model: "demo:scholar" }]
target: guardian
data: { train: "demo:fusion.jsonl" }
schedule: fusellm
generation: { max_new_tokens: 4 }
decode: { max_segment_tokens: 4 }
"""


class Echo(Decoder):
    """Answers a prompt with itself, and remembers what it was asked."""

    def __init__(self):
        self.voices: Any = [SimpleNamespace(name="a")]
        self.asked: list[str] = []

    def choices(self, speakers):
        raise NotImplementedError

    def check_fits(self, prompt):
        pass

    def answer(self, prompt):
        self.asked.append(prompt)
        return Answer(f"Answer: {prompt}", True, (), "a")


@pytest.fixture
def output(tmp_path):
    """A file with the answers to all prompts."""
    path = tmp_path / "answers.jsonl"
    list(answer_file(Echo(), PROMPTS, path, "key"))
    return path


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a recipe and two prompts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "prompts.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "How?"}\r\n\r\n{"prompt": "Why?"}\r\n')
    return tmp_path


def test_whatever_a_row_was_killed_in_it_goes_on_to_the_same_file(output):
    whole = output.read_bytes()
    assert [json.loads(line)["prompt"] for line in whole.split(b"\n")[:-1]] == PROMPTS
    for size in range(len(whole) + 1):
        output.write_bytes(whole[:size])
        echo = Echo()
        list(answer_file(echo, PROMPTS, output, "key"))
        assert output.read_bytes() == whole
        assert echo.asked == PROMPTS[whole[:size].count(b"\n") :]


def test_no_bit_of_a_row_changes_unnoticed(output):
    """A row may only be laid out otherwise: JSON has several spellings of one value. A row is cut where it has no end."""
    whole = output.read_bytes()
    rows = [json.loads(line) for line in whole.split(b"\n")[:-1]]
    first, messages = whole.index(b"\n"), set()
    for bit in range(8 * first):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        output.write_bytes(data)
        try:
            assert finished_rows(output, PROMPTS, "key") == 3
        except DataError as error:
            messages.add(str(error))
        else:
            assert [json.loads(line) for line in output.read_bytes().split(b"\n")[:-1]] == rows
    assert messages
    assert all("line 1" in message and "\n" not in message for message in messages)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"null\n", "line 1 of"),
        (b"[1]\n", "line 1 of"),
        (b"\xff\xfe\n", "line 1 of"),
        (b"[" * 9999 + b"\n", "line 1 of"),
        (b'{"prompt": "one", "response": "by hand"}\n', "sha256"),
        (b'{"prompt": "another"}\n', "answers to the same prompts"),
        (b"\n", "line 1 of"),
    ],
)
def test_a_foreign_file_is_refused_and_stays_as_it_is(tmp_path, content, says):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content + b"half a row")
    with pytest.raises(DataError, match=says):
        list(answer_file(Echo(), PROMPTS, path, "key"))
    assert path.read_bytes() == content + b"half a row"


def test_rows_of_other_settings_are_not_taken_for_these(output):
    with pytest.raises(DataError, match="same sources and settings"):
        finished_rows(output, PROMPTS, "another key")


def test_the_advice_for_a_damaged_row_works(output):
    whole = output.read_bytes()
    output.write_bytes(whole.replace(b"Answer: zwei", b"Answer: drei"))
    with pytest.raises(DataError, match=r"line 2 .* take it and all lines behind it out"):
        finished_rows(output, PROMPTS, "key")
    output.write_bytes(whole[: whole.index(b"\n") + 1])
    list(answer_file(Echo(), PROMPTS, output, "key"))
    assert output.read_bytes() == whole


def test_two_processes_do_not_write_one_file(output):
    with open(output, "ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process writes"):
            list(answer_file(Echo(), PROMPTS, output, "key"))
    assert not list(answer_file(Echo(), PROMPTS, output, "key"))


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(answers):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("profuser.generate.answers.sealed", lambda row: row)
    monkeypatch.setattr("profuser.generate.answers.Progress.update", full)
    monkeypatch.setattr("builtins.open", lambda *a, _open=open, **k: Full(_open(*a, **k)))
    with pytest.raises(DiskFull, match=r"answers.jsonl needs [\d,]+ bytes"):
        list(answer_file(Echo(), PROMPTS, tmp_path / "answers.jsonl", "key"))


class Full:
    """A file to which nothing can be written."""

    def __init__(self, file):
        self._file = file

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def fileno(self):
        return self._file.fileno()

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_text_may_hold_any_end_of_line_but_a_newline(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\r\n" for p in PROMPTS), newline="")
    assert prompts_of(path) == PROMPTS
    path.write_text("\n \n")
    with pytest.raises(DataError, match="has none"):
        prompts_of(path)


def test_the_key_is_that_of_what_decides_an_answer(place):
    def key(*changes):
        return settings_key(parse_run("generate", ["--config", "recipe.yaml", *changes]).recipe)

    template = (Path(resolve("demo:scholar")) / "chat_template.jinja").read_text(encoding="utf-8")
    Path("other.jinja").write_text(template.replace("USER", "ASKER"), encoding="utf-8")
    Path("dated.jinja").write_text(template.replace("USER", "{{ strftime_now('%d %b %Y') }} USER"), encoding="utf-8")
    of_template = "--sources=[{{name: guardian, model: 'demo:guardian'}}, {{name: scholar, model: 'demo:scholar', chat_template: {}}}]"
    dated = of_template.format("dated.jinja")
    own = key()
    assert own == key("--optim.steps=3", "--store=elsewhere", "--output=elsewhere", "--date=2026-01-31")
    assert key(dated, "--date=2026-01-31") == key(dated, "--date=2026-01-31")
    others = [
        ("--decode.method=eva",),
        ("--decode.top_n=2",),
        ("--decode.weights=[1, 2]",),
        ("--generation.max_new_tokens=5",),
        ("--capture.dtype=bfloat16",),
        ("--sources=[{name: guardian, model: 'demo:guardian'}]",),
        ("--sources=[{name: guardian, model: 'demo:guardian'}, {name: scholar, model: 'demo:reckoner'}]",),
        (of_template.format("other.jinja"),),
        (dated, "--date=2026-01-31"),
        (dated, "--date=2026-02-01"),
    ]
    assert len({own, *(key(*change) for change in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--input", "prompts.jsonl", "--output", "prompts.jsonl"), 2, "different files"),
        (("--input", "prompts.jsonl", "--output", "a.jsonl", "--trace", "./a.jsonl"), 2, "different files"),
        (("--input", "prompts.jsonl", "--output", "folder"), 2, "--output must be a file"),
        (("--input", "prompts.jsonl", "--output", "/dev/null"), 2, "--output must be a file"),
        (("--input", "prompts.jsonl", "--output", "pipe"), 2, "--output must be a file"),
        (("--input", "pipe", "--output", "a.jsonl"), 3, "--input must be an existing JSONL file"),
        (("--input", "/dev/zero", "--output", "a.jsonl"), 3, "--input must be an existing JSONL file"),
        (("--prompt", "x", "--trace", "folder"), 2, "--trace must be a file"),
        (("--prompt", "x", "--trace", "."), 2, "--trace must be a file"),
        (
            ("--prompt", "x", "--trace", "pipe/new/t.html"),
            2,
            "--trace must be in a directory, got pipe/new/t.html, for which pipe is",
        ),
        (("--input", "prompts.jsonl", "--output", "recipe.yaml/a.jsonl"), 2, "--output must be in a directory"),
        (("--prompt", "x\udcff"), 3, "--prompt must be Unicode"),
        (("--prompt", "word " * 999), 3, "must have at most 512 tokens"),
    ],
)
def test_what_no_answer_is_written_for_is_one_line(place, arguments, code, says):
    (place / "folder").mkdir()
    os.mkfifo(place / "pipe")
    found, out, err = run("generate", "--config", "recipe.yaml", *arguments)
    assert (found, out) == (code, "")
    assert says in err
    assert err.count("\n") == 1
    assert sorted(os.listdir()) == ["folder", "pipe", "prompts.jsonl", "recipe.yaml"]


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
@pytest.mark.parametrize(("data", "code"), [("café\n".encode(), 0), (b"caf\xe9\n", 3)])
def test_prompts_from_a_pipe_are_utf8_whatever_the_locale(place, monkeypatch, encoding, data, code):
    asked = []
    monkeypatch.setattr("profuser.generate.__main__.streamed", lambda fusion, prompt: asked.append(prompt))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding=encoding))
    found, _, err = run("generate", "--config", "recipe.yaml")
    assert found == code, err
    assert asked == (["café"] if code == 0 else [])
    assert err.count("\n") == (code != 0)


def test_a_lack_of_memory_is_one_line():
    assert isinstance(explained(MemoryError()), OutOfMemoryError)
