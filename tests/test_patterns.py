"""A tokenizer's regular expression that takes exponential time is found when the tokenizer is opened; what others take is not."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from command_runs import run
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from profuser.cli import main_of
from profuser.errors import DataError
from profuser.models.load import load_tokenizer
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.text import patterns
from profuser.text.patterns import check_patterns

HARD = [
    r"(a+)+$",
    r"(a|aa)+$",
    r"(z+)+q",
    r"(\w+\s?)+$",
    r"(\d+)*$",
    r"(\s+)+\S",
    r"(\p{L}+)+\d",
    r"(é+)+b",
    r"(xy|x|y)+$",
]
USUAL = [
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t)?|\p{N}{1,3}|\s+(?!\S)|\s+",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"\d{1,3}(?=(?:\d{3})*\b)",
    " {2,}",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 1)


def tokenizer(part: str, pattern: str) -> Tokenizer:
    bare = Tokenizer(models.WordLevel({"": 0}, unk_token=""))
    if part == "normalizer":
        bare.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(pattern), "x")])
    else:
        bare.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated")])
    return bare


@pytest.mark.parametrize("pattern", HARD)
def test_a_pattern_that_takes_exponential_time_is_refused(pattern, capfd):
    with pytest.raises(DataError, match=r"^m: .* takes exponential time") as error:
        check_patterns("m", tokenizer("pre_tokenizer", pattern))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


def test_a_normaliser_has_patterns_as_well():
    with pytest.raises(DataError, match="takes exponential time"):
        check_patterns("m", tokenizer("normalizer", HARD[0]))


@pytest.mark.parametrize("pattern", USUAL)
def test_the_patterns_in_use_are_not(pattern):
    check_patterns("m", tokenizer("pre_tokenizer", pattern))


def test_one_that_was_tried_is_not_tried_again(monkeypatch):
    check_patterns("m", tokenizer("pre_tokenizer", USUAL[0]))
    monkeypatch.setattr(patterns, "hard_texts", None)
    monkeypatch.setattr(patterns.multiprocessing, "get_context", None)
    began = time.perf_counter()
    check_patterns("another", tokenizer("pre_tokenizer", USUAL[0]))
    assert time.perf_counter() - began < 0.5


def test_a_tokenizer_without_patterns_starts_no_process(monkeypatch):
    monkeypatch.setattr(patterns.multiprocessing, "get_context", None)
    load_tokenizer(SourceConfig(name="m", model="demo:guardian"))


def test_a_command_says_it_in_one_line(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(resolve("demo:guardian"), model)
    content = json.loads((model / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}
    (model / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "text").write_text("a" * 50 + "!")
    arguments = ("--tokenizers", "demo:guardian", str(model), "--text", str(tmp_path / "text"))
    code, out, err = run("doctor", *arguments)
    assert (code, out, err.count("\n")) == (3, "", 1)
    assert "takes exponential time" in err


def test_what_gives_up_in_another_way_is_no_traceback(capfd):
    """tokenizers raises what is no Exception where a pattern is too hard for a text of the data alone."""

    def command(argv):
        tokenizer("pre_tokenizer", HARD[0]).encode("a" * 50 + "!")

    with pytest.raises(SystemExit) as end:
        main_of(command, [])
    assert end.value.code == 3
    assert "Traceback" not in (err := capfd.readouterr().err)
    assert err.splitlines()[-1].startswith("error: a tokenizer or a file of weights could not be used (Onig: ")
