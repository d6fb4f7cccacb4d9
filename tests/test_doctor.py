"""The doctor gives every target token one kind, skips by lines what tokens cannot hold, and says so in its output."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import CONTROL, SMALL, byte_level, chained, real_tokenizer, wrap
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from profuser.alignment import fusellm
from profuser.alignment.align import PlainText
from profuser.alignment.types import KINDS
from profuser.doctor import diagnosis
from profuser.doctor.__main__ import main
from profuser.doctor.diagnosis import diagnose, view
from profuser.doctor.token_rows import example_rows
from profuser.errors import DataError, ProfuserError
from profuser.experiments import alignment_pairs
from profuser.experiments.page import write_section
from profuser.text.display import clipped, use_color

KEYS = {
    "target", "source", "text", "align", "engine", "positions", "bytes", *KINDS, "usable", "mapped_mass", "reliability", "skips",
}  # fmt: skip
DEMO = ("demo:scholar", "demo:guardian")
NFD = "Cafe\u0301 one\n"


def side(tokenizer) -> PlainText:
    return PlainText(wrap(tokenizer))


@functools.cache
def small_side(name: str) -> PlainText:
    return side(SMALL[name]())


def names(diagnosis) -> list[str]:
    return [KINDS[k] for k in diagnosis.kind]


def check(diagnosis, text: str) -> None:
    """Checks what holds for any text."""
    assert sum(diagnosis.counts.values()) == len(diagnosis.kind)
    assert sum(diagnosis.shares[name] for name in KINDS) == pytest.approx(1)
    assert diagnosis.shares["usable"] == 1 - diagnosis.shares["skipped"]
    assert sum(skip.positions for skip in diagnosis.skips) == diagnosis.counts["skipped"]
    assert len(diagnosis.data) == len(text.encode())


def run(capsys, *argv: str | Path) -> str:
    main([str(a) for a in argv])
    return capsys.readouterr().out


@pytest.fixture
def text_file(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "text.txt"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_a_hand_made_pair_has_the_kinds_that_one_can_count():
    # The target's tokens are |the|se| cat|s|, the source's are |th|ese| cats|.
    target, source = side(chained("the", "se", " cat")), side(chained("th", "ese", " cats"))
    assert names(diagnose(target, source, "these cats")) == ["shared_prefix", "inside", "shared_prefix", "inside"]
    assert names(diagnose(target, target, "these cats")) == ["same_span"] * 4
    swapped = diagnose(source, target, "these cats")
    assert names(swapped) == ["shared_prefix", "inside", "shared_prefix"]
    assert swapped.shares == {"same_span": 0, "shared_prefix": 2 / 3, "inside": 1 / 3, "skipped": 0, "usable": 1}


def test_dummy_leading_space_is_clipped_and_a_zero_width_token_counts():
    target, source = side(SMALL["llama-2 prepend"]()), side(byte_level(500))
    diagnosis = diagnose(target, source, "\u00ffx")  # no token is a space and ÿ, so the first one is a ▁ without bytes
    begin, end = diagnosis.target
    assert begin[0] == end[0] == begin[1] == 0
    assert len(diagnosis.kind) == len(view(target.token_bytes, "\u00ffx").ids)
    assert names(diagnosis)[0] == "shared_prefix"
    # Here |▁hello|, which begins at byte -1, meets |hello|.
    assert names(diagnose(target, side(chained("hello")), "hello")) == ["same_span"]


def test_literal_control_strings_are_text():
    target = side(byte_level(500))
    assert not set(view(target.token_bytes, "a</s>b").ids) & set(target.token_bytes.specials)


def test_a_normaliser_costs_its_line_and_no_other():
    text = f"Things like these.\n{NFD}\ndon't happen.\n"
    plain, nfc = side(byte_level(500)), side(byte_level(460, nfc=True))
    for target, source in ((plain, nfc), (nfc, plain), (nfc, nfc)):
        diagnosis = diagnose(target, source, text)
        check(diagnosis, text)
        (skip,) = diagnosis.skips
        assert (skip.reason, skip.text) == ("normaliser", NFD)
        # The tokens are those of the whole text, even if the target is what changes it.
        ids = target.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert len(diagnosis.kind) == len(ids)
        line = target.tokenizer(NFD, add_special_tokens=False)["input_ids"]
        skipped = np.flatnonzero(diagnosis.kind == KINDS.index("skipped"))
        assert [ids[i] for i in skipped] == line
    unchanged = diagnose(plain, nfc, unicodedata.normalize("NFC", text))
    assert unchanged.counts["skipped"] == 0


def test_kinds_beside_a_changed_line_are_those_of_the_text_without_it():
    before, after = "Things like these.\n", "don't happen.\n"
    plain, nfc = side(byte_level(500)), side(byte_level(460, nfc=True))
    kinds = [name for name in names(diagnose(plain, nfc, before + NFD + after)) if name != "skipped"]
    assert kinds == names(diagnose(plain, nfc, before)) + names(diagnose(plain, nfc, after))


def test_a_token_across_the_end_of_a_changed_line_is_skipped_whole():
    target = side(chained("\n", split=False))
    config = json.loads(chained("\n\n", split=False).to_str())
    config["normalizer"] = {"type": "NFC"}
    source = side(Tokenizer.from_str(json.dumps(config)))
    diagnosis = diagnose(target, source, "e\u0301\n\nab")
    assert names(diagnosis) == ["skipped"] * 5 + ["same_span"] * 2
    check(diagnosis, "e\u0301\n\nab")


def test_a_literal_sentencepiece_mark_costs_its_line():
    diagnosis = diagnose(side(SMALL["llama-2 prepend"]()), side(byte_level(500)), "one\na ▁ b\ntwo\n")
    assert [(skip.reason, skip.text) for skip in diagnosis.skips] == [("decoder", "a ▁ b\n")]


def words_only() -> PlainText:
    """A tokenizer with an unknown token and few words, which has no tokens for most texts."""
    vocab = {token: i for i, token in enumerate(["<unk>", *CONTROL, "a", "b", "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<unk>"])
    return side(tokenizer)


def test_what_a_tokenizer_has_no_tokens_for_costs_its_line():
    text = "ab\nab\naXb\nba\nX"
    few, plain = words_only(), side(byte_level(500))
    for target, source in ((few, plain), (plain, few)):
        diagnosis = diagnose(target, source, text)
        check(diagnosis, text)
        assert [(s.reason, s.text) for s in diagnosis.skips] == [("decoder", "aXb\n"), ("decoder", "X")]
    diagnosis = diagnose(few, plain, text)
    assert names(diagnosis) == ["same_span"] * 6 + ["skipped"] * 4 + ["same_span"] * 3 + ["skipped"]


pieces = st.sampled_from(
    ["\n", " ", "  ", "\t", "hello", "Things", "e\u0301", "é", "你好", "👩‍👩‍👧", "▁", "\x00", *CONTROL]
)


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(pieces | st.text(max_size=4), max_size=12).map("".join),
    target=st.sampled_from([*SMALL]),
    source=st.sampled_from([*SMALL]),
)
def test_any_text_has_kinds_that_sum_to_one_and_is_drawn_without_control_characters(text, target, source):
    diagnosis = diagnose(small_side(target), small_side(source), text)
    check(diagnosis, text)
    assert {skip.reason for skip in diagnosis.skips} <= {"normaliser", "decoder"}
    for example in example_rows(
        diagnosis.data, diagnosis.target, diagnosis.kind, diagnosis.source, color=False, width=60
    ):
        assert all(row.isprintable() for row in example)


def test_an_empty_text_has_no_position_and_nothing_usable(capsys, text_file):
    printed = json.loads(run(capsys, "--tokenizers", *DEMO, "--text", text_file(""), "--json"))
    assert printed["positions"] == printed["bytes"] == 0
    assert [printed[name] for name in (*KINDS, "usable")] == [0, 0, 0, 1, 0]
    assert "0 target tokens" in run(capsys, "--tokenizers", *DEMO, "--text", text_file(""))


def test_json_is_one_object_with_every_key(capsys, text_file):
    path = text_file(" The answer is 42.\r\n\n")
    out = run(capsys, "--tokenizers", *DEMO, "--text", path, "--json")
    printed = json.loads(out)
    assert out.count("\n") == 1
    assert set(printed) == KEYS
    assert sum(printed[name] for name in KINDS) == pytest.approx(1)
    assert printed["usable"] == 1 - printed["skipped"]
    assert printed["bytes"] == len(path.read_bytes())
    assert printed["mapped_mass"] is None
    assert printed["reliability"] is None
    assert (printed["target"], printed["source"], printed["align"]) == (*DEMO, "bytes")


def test_table_shows_counts_skips_and_example_lines_without_colours(capsys, text_file, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    out = run(capsys, "--tokenizers", *DEMO, "--text", text_file("Things like these \x1b[31m cats.\n"))
    assert "\x1b" not in out
    assert r"\x1b[31m" in out
    for name in (*KINDS, "usable", "engine", "line 1"):
        assert name in out


def test_colours_only_on_a_terminal_or_when_forced_and_never_with_no_color(monkeypatch):
    for name in ("FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    assert not use_color()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert use_color()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not use_color()
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not use_color()
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert use_color()


def test_marks_stand_under_the_first_character_of_each_token():
    target, source = side(chained("the", "se", " cat")), side(chained("th", "ese", " cats"))
    diagnosis = diagnose(target, source, "these cats\n")
    arguments = (diagnosis.data, diagnosis.target, diagnosis.kind, diagnosis.source)
    ((title, text, marks, ticks),) = example_rows(*arguments, color=False, width=80)
    assert title == "line 1"
    assert text == "text    these·cats⏎"
    assert marks == "target  ~  < ~   <="
    assert ticks == "source  | |  |    |"
    ((_, *colored),) = example_rows(*arguments, color=True, width=80)
    assert [re.sub(r"\x1b\[[\d;]*m", "", row) for row in colored] == [text, marks, ticks]


def test_wide_characters_and_bytes_within_one_keep_the_columns():
    target, source = side(chained()), side(chained("你", split=False))
    diagnosis = diagnose(source, source, "你a")
    arguments = (diagnosis.data, diagnosis.target, diagnosis.kind, diagnosis.source)
    ((_, text, marks, _),) = example_rows(*arguments, color=False, width=80)
    assert (text, marks) == ("text    你a", "target  = =")
    diagnosis = diagnose(target, source, "你a")
    arguments = (diagnosis.data, diagnosis.target, diagnosis.kind, diagnosis.source)
    ((_, text, marks, ticks),) = example_rows(*arguments, color=False, width=80)
    assert text == r"text    \xe4\xbd\xa0a"
    assert marks == "target  ~   <   <   ="
    assert ticks == "source  |           |"


def test_examples_show_every_kind_that_occurs():
    plain, nfc = side(chained("the", "se", "cat")), side(byte_level(460, nfc=True))
    text = "cat\n" * 30 + NFD + "cat\n" * 30 + "these things\n"
    diagnosis = diagnose(plain, nfc, text)
    rows = example_rows(diagnosis.data, diagnosis.target, diagnosis.kind, diagnosis.source, color=False, width=80)
    marks = "".join(row[2][8:] for row in rows)
    assert {mark for mark, n in zip("=~<x", diagnosis.counts.values()) if n} <= set(marks)
    assert "line 31" in [row[0] for row in rows]


def test_clipped_text_is_printable_and_fits():
    assert clipped("a\x1bb\n", 20) == r"a\x1bb⏎"
    assert clipped("你" * 9, 5) == "你你…"


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["--tokenizers", "demo:scholar", "--text", "x"], 2, "expected 2 arguments"),
        (["--tokenizers", *DEMO], 2, "--text"),
        (["--tokenizers", *DEMO, "--text", "/no/such/file"], 3, "No such file"),
        (["--tokenizers", *DEMO, "--text", "."], 3, "directory"),
        (["--tokenizers", "demo:scholar", "./nowhere", "--text", __file__], 3, "SOURCE: model must be an existing"),
        (["--tokenizers", "demo:../x", "demo:scholar", "--text", __file__], 3, "TARGET"),
    ],
)
def test_bad_input_is_an_error_of_its_kind(capsys, argv, code, said):
    with pytest.raises((ProfuserError, SystemExit)) as caught:
        main(argv)
    error = caught.value
    assert (error.code if isinstance(error, SystemExit) else error.exit_code) == code
    message = capsys.readouterr().err.splitlines()[-1] if isinstance(error, SystemExit) else str(error)
    assert said in message
    assert "\n" not in message


def test_command_ends_in_one_line_and_the_exit_code_of_the_error():
    done = subprocess.run(
        [sys.executable, "-m", "profuser.doctor", "--tokenizers", *DEMO, "--text", "/no/such/file"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert (
        done.stderr
        == "error: --text must be a readable file, got /no/such/file (No such file or directory); fix the path\n"
    )


def test_text_must_be_utf8(text_file):
    with pytest.raises(DataError, match=r"must be UTF-8, .* has the byte 0xff at 3; convert it"):
        main(["--tokenizers", *DEMO, "--text", str(text_file(b"abc\xff"))])


def test_a_tokenizer_that_cannot_be_loaded_is_a_data_error(tmp_path, text_file):
    for content in ("{", '{"version": "1.0", "model": {"type": "Nope"}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        with pytest.raises(DataError, match="no tokenizer could be loaded"):
            main(["--tokenizers", "demo:scholar", str(tmp_path), "--text", str(text_file("x"))])


def test_fusellm_counts_only_what_its_rule_accepts(tmp_path, monkeypatch):
    monkeypatch.setenv("PROFUSER_CACHE", str(tmp_path))
    target, source = side(chained("the", "se", " cat", "dog")), side(chained("th", "ese", " cats", "dog"))
    text = f"these cats\ndog\n{NFD}"
    ours, theirs = diagnose(target, source, text), diagnose(target, source, text, "fusellm")
    check(theirs, text)
    target_ids, source_ids = (view(s.token_bytes, text).ids for s in (target, source))
    accepted, _ = fusellm.accepted_positions(
        target_ids, source_ids, target, source, fusellm.vocabulary_map(target, source)
    )
    np.testing.assert_array_equal(theirs.kind, np.where(accepted, ours.kind, KINDS.index("skipped")))
    assert 0 < theirs.counts["skipped"] < len(theirs.kind)
    assert [(s.reason, s.text) for s in theirs.skips] == [("not_matched", None)]


def test_fusellm_refuses_a_text_whose_table_would_not_fit(monkeypatch):
    monkeypatch.setattr(diagnosis, "MAX_PAIRS", 3)
    with pytest.raises(DataError, match="at most 3 pairs, got 2 x 2 tokens"):
        diagnose(side(chained()), side(chained()), "ab", "fusellm")


@pytest.mark.parametrize(("target", "source"), alignment_pairs.PAIRS)
def test_real_pairs_leave_out_nothing_but_what_a_normaliser_changes(target, source):
    sides = [PlainText(real_tokenizer(name)) for name in (target, source)]
    text = f"Things like these.\n\n{NFD}\ndef f(x):\n    return  x + 1  # 你好 👩‍👩‍👧 </s> <|endoftext|>\n\n"
    diagnosis = diagnose(sides[0], sides[1], text)
    check(diagnosis, text)
    changes = {"qwen2", "gpt_neox"} & {target, source}
    assert {(s.reason, s.text) for s in diagnosis.skips} == ({("normaliser", NFD)} if changes else set())
    held = sides[0].token_bytes.encode_parts([(text, True)])[0]
    assert len(diagnosis.kind) == len(held)


def test_the_table_of_pairs_lists_every_skip_with_its_text():
    plain, nfc = side(byte_level(500)), side(byte_level(460, nfc=True))
    diagnosis = diagnose(plain, nfc, f"Things.\n{NFD}")
    page = alignment_pairs.markdown({("a", "b", "en"): {"bytes": diagnosis, "fusellm": diagnosis}}, "command")
    n = len(diagnosis.kind)
    shares = " | ".join(f"{100 * share:.1f}" for share in diagnosis.shares.values())
    usable = f"{100 * diagnosis.shares['usable']:.1f}"
    assert f"| a ← b | en | {n} | {shares} | {usable} |" in page
    assert f"- a ← b, en: {diagnosis.counts['skipped']} positions, normaliser: ` Cafe\u0301 one\\n `" in page


def test_a_section_of_a_page_is_replaced_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: begin -->\nold\n<!-- a: end -->\nafter\n")
    write_section(page, "a", "new")
    assert page.read_text() == "before\n<!-- a: begin -->\nnew\n<!-- a: end -->\nafter\n"
    with pytest.raises(DataError, match="<!-- b: begin -->"):
        write_section(page, "b", "new")
