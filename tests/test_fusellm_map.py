"""FuseLLM's vocabulary map and its cache, and the warping path, which agrees with an oracle."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import Side, side

from profuser.alignment import fusellm
from profuser.alignment.fusellm import code_points, dtw, dtw_python, vocabulary_map
from profuser.text.token_bytes import TokenBytes

ENGINES = [
    pytest.param(dtw_python, id="Python"),
    pytest.param(
        dtw, id="C++", marks=pytest.mark.skipif(fusellm._align is None, reason="the C++ extension is not built")
    ),
]


def named_map(target: Side, source: Side, cache: Path) -> dict[str, str | None]:
    mapped = vocabulary_map(target, source, cache_dir=cache)
    assert mapped.dtype == np.int32
    names = {i: token for token, i in target.vocab.items()}
    return {token: names.get(mapped[i]) for token, i in source.vocab.items()}


# The vocabulary map


def test_equal_strings_map_after_the_word_prefix_is_replaced(tmp_path):
    target = side("▁the", "the", "▁▁", "end")
    source = side("the", "Ġthe", "ĠĠ", "end")
    named = named_map(target, source, tmp_path)
    assert named == {"<end>": "<end>", "the": "the", "Ġthe": "▁the", "ĠĠ": "▁▁", "end": "end"}


def test_other_strings_map_to_the_nearest(tmp_path):
    target = side("▁help", "hello", "world", "x")
    source = side("Ġhelpe", "helloo", "wrld", "é")
    named = named_map(target, source, tmp_path)
    assert named == {"<end>": "<end>", "Ġhelpe": "▁help", "helloo": "hello", "wrld": "world", "é": "x"}


def test_ties_go_to_the_lowest_target_id(tmp_path):
    target = side("▁long", "cat", "at", "bat", "cats")
    assert named_map(target, side("Ġ", "rat", "ca", "qqq"), tmp_path)["rat"] == "cat"
    assert named_map(target, side("Ġ", "rat", "ca", "qqq"), tmp_path)["ca"] == "cat"
    # All tokens of up to three letters are three edits away.
    assert named_map(target, side("Ġ", "rat", "ca", "qqq"), tmp_path)["qqq"] == "cat"


def test_control_tokens_map_by_role_only(tmp_path):
    target = side("▁a", "s", control=("<s>", "</s>"), end="</s>")
    source = side("Ġa", "<s>x", control=("<bos>", "<s>", "<eot>"), end="<eot>")
    named = named_map(target, source, tmp_path)
    assert named["<eot>"] == "</s>"
    assert named["<bos>"] is None
    assert named["<s>"] is None, "it is a control token of the source, although the target has the same string"
    assert named["<s>x"] == "s", "`s` is three edits away; <s> is only one away, but is a control token"


def test_without_an_end_of_turn_its_token_maps_to_nothing(tmp_path):
    assert named_map(side("▁a", end=None), side("Ġa"), tmp_path) == {"<end>": None, "Ġa": "▁a"}
    assert named_map(side("▁a"), side("Ġa", end=None), tmp_path) == {"<end>": None, "Ġa": "▁a"}


def test_an_id_without_a_token_maps_to_nothing(tmp_path):
    source = side("Ġa", "b")
    source.tokenizer.add_tokens(["c"])
    source.token_bytes = TokenBytes(source.tokenizer)
    vocab = source.tokenizer.get_vocab()
    gap = vocab.pop("b")
    source.tokenizer.get_vocab = lambda: vocab
    mapped = vocabulary_map(side("▁a", "b", "c"), source, cache_dir=tmp_path)
    assert mapped[gap] == -1
    assert (np.delete(mapped, gap) >= 0).all()


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(before + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


WORDS = st.text(alphabet="abcé你🙂", min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(WORDS, min_size=1, max_size=8, unique=True),
    st.lists(st.text(alphabet="abcx", min_size=1, max_size=5), min_size=1, max_size=12, unique=True),
)
def test_nearest_equals_a_search_over_all(queries, choices):
    expected = [min(range(len(choices)), key=lambda i: (levenshtein(query, choices[i]), i)) for query in queries]
    assert fusellm._nearest(queries, choices).tolist() == expected


def test_nearest_in_small_portions_is_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    words: list[str] = ["".join(rng.choice(list("abcd"), rng.integers(1, 9))) for _ in range(300)]
    whole = fusellm._nearest(words[:150], words[150:])
    monkeypatch.setattr(fusellm, "MAX_DISTANCES", 40)
    np.testing.assert_array_equal(fusellm._nearest(words[:150], words[150:]), whole)


# The cache of the map


def test_the_map_is_read_back_from_disk(tmp_path, monkeypatch):
    target, source = side("▁a", "b"), side("Ġa", "c")
    first = vocabulary_map(target, source, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1

    def never(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(fusellm, "_compute_map", never)
    again = vocabulary_map(target, source, cache_dir=tmp_path)
    np.testing.assert_array_equal(again, first)
    assert again.dtype == np.int32


def test_other_vocabularies_have_other_files(tmp_path):
    pairs = [
        (side("▁a", "b"), side("Ġa", "c")),
        (side("▁a", "b"), side("Ġa", "d")),
        (side("▁a", "e"), side("Ġa", "c")),
        (side("▁a", "b"), side("Ġa", "c", end=None)),
    ]
    for target, source in pairs:
        vocabulary_map(target, source, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(pairs)


@pytest.mark.parametrize("damage", ["empty", "truncated", "other shape", "out of range"])
def test_a_damaged_file_is_made_again(tmp_path, damage):
    target, source = side("▁a", "b"), side("Ġa", "c")
    first = vocabulary_map(target, source, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    if damage in ("empty", "truncated"):
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else -3])
    else:
        np.save(path, first[:-1] if damage == "other shape" else first + 100)
    np.testing.assert_array_equal(vocabulary_map(target, source, cache_dir=tmp_path), first)
    np.testing.assert_array_equal(np.load(path), first)


def test_the_cache_directory_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("PROFUSER_CACHE", str(tmp_path / "elsewhere"))
    vocabulary_map(side("▁a"), side("Ġa"))
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_cache_that_cannot_be_written_costs_no_run(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    mapped = vocabulary_map(side("▁a"), side("Ġa"), cache_dir=tmp_path / "file")
    assert mapped.tolist() == [0, 1]
    assert "PROFUSER_CACHE" in caplog.text


# Dynamic time warping


def walk(engine, source: list[str], target: list[str]) -> list[tuple[int, int]]:
    positions = engine(*code_points(source), *code_points(target))
    assert all(p.dtype == np.int32 for p in positions)
    return list(zip(*(p.tolist() for p in positions), strict=True))


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_sequences_are_walked_diagonally(engine):
    assert walk(engine, ["the", "", "cat"], ["the", "", "cat"]) == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_token_stands_beside_the_parts_of_it(engine):
    assert walk(engine, ["monday", "hello", "friday"], ["monday", "he", "llo", "friday"]) == [
        (0, 0),
        (1, 1),
        (1, 2),
        (2, 3),
    ]
    assert walk(engine, ["monday", "he", "llo", "friday"], ["monday", "hello", "friday"]) == [
        (0, 0),
        (1, 1),
        (2, 1),
        (3, 2),
    ]


@pytest.mark.parametrize("engine", ENGINES)
def test_equally_cheap_steps_are_diagonal_then_up_then_left(engine):
    assert walk(engine, ["a", "a"], ["a", "a"]) == [(0, 0), (1, 1)], "all steps back cost nothing"
    assert walk(engine, ["a", "a", "a"], ["a", "a"]) == [(0, 0), (1, 0), (2, 1)], "the detour comes first in the text"
    assert walk(engine, ["a", "a"], ["a", "a", "a"]) == [(0, 0), (0, 1), (1, 2)]
    # Before (2, 2), the steps up (1, 2) and left (2, 1) cost 1, and the diagonal one (1, 1) costs 2. So up is taken.
    assert walk(engine, ["ab", "aa", "bb"], ["ab", "bb", "aa"]) == [(0, 0), (0, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sequence_of_no_tokens_has_no_path(engine):
    assert walk(engine, [], ["a"]) == walk(engine, ["a"], []) == walk(engine, [], []) == []


TOKENS = st.text(alphabet="abé你🙂\ud800", max_size=5) | st.sampled_from(
    ["ab", "a" * 64, "ab" * 33, "b" * 300, "ba" * 65]
)


@pytest.mark.skipif(fusellm._align is None, reason="the C++ extension is not built")
@settings(max_examples=300, deadline=None)
@given(st.lists(TOKENS, max_size=9), st.lists(TOKENS, max_size=9), st.integers(1, 2))
def test_engines_walk_the_same_path(source, target, times):
    assert walk(dtw, source * times, target) == walk(dtw_python, source * times, target)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_path_is_the_cheapest(engine):
    rng = np.random.default_rng(1)
    words = ["".join(rng.choice(list("ab"), rng.integers(0, 4))) for _ in range(200)]

    def cheapest(source, target):  # the cost from here to the end, found by trying all paths
        here = levenshtein(source[0], target[0])
        after = (
            [(1, 1)] * (len(source) > 1 and len(target) > 1)
            + [(1, 0)] * (len(source) > 1)
            + [(0, 1)] * (len(target) > 1)
        )
        return here + min((cheapest(source[i:], target[j:]) for i, j in after), default=0)

    for _ in range(30):
        source = list(rng.choice(words, rng.integers(1, 6)))
        target = list(rng.choice(words, rng.integers(1, 6)))
        path = walk(engine, source, target)
        assert path[0] == (0, 0)
        assert path[-1] == (len(source) - 1, len(target) - 1)
        assert {(k - i, l - j) for (i, j), (k, l) in itertools.pairwise(path)} <= {(1, 1), (1, 0), (0, 1)}
        assert sum(levenshtein(source[i], target[j]) for i, j in path) == cheapest(source, target)


GOOD = (np.array([97, 98, 99], np.uint32), np.array([0, 1, 3], np.int64))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("codes", "offsets", "error", "message"),
    [
        (GOOD[0].astype(np.int64), GOOD[1], TypeError, "uint32.*int64"),
        (GOOD[0].astype(np.int32), GOOD[1], TypeError, "uint32.*int32"),
        (GOOD[0], GOOD[1].astype(np.int32), TypeError, "int64.*int32"),
        (GOOD[0], [0, 1, 3], TypeError, "int64.*list"),
        (GOOD[0].reshape(1, 3), GOOD[1], ValueError, "1-D"),
        (GOOD[0], np.array([0, 1, 4], np.int64), ValueError, "3, got.*4"),
        (GOOD[0], np.array([0, 1, 2], np.int64), ValueError, "3, got.*2"),
        (GOOD[0], np.array([1, 2, 3], np.int64), ValueError, "from 0.*got.*1"),
        (GOOD[0], np.array([-1, 3], np.int64), ValueError, "from 0.*got.*-1"),
        (GOOD[0], np.array([0, 2, 1, 3], np.int64), ValueError, "offsets must"),
        (GOOD[0], np.array([0, 2**62, 3], np.int64), ValueError, "offsets must"),
        (GOOD[0], np.array([0, -(2**62), 3], np.int64), ValueError, "offsets must"),
        (GOOD[0], np.zeros(0, np.int64), ValueError, "offsets must"),
        (np.array([-1, 98, 99], np.int32).view(np.uint32), GOOD[1], ValueError, "0x10FFFF"),
    ],
)
def test_bad_arrays_are_refused_on_either_side(engine, codes, offsets, error, message):
    for arguments in ((codes, offsets, *GOOD), (*GOOD, codes, offsets)):
        with pytest.raises(error, match=message):
            engine(*arguments)


@pytest.mark.skipif(fusellm._align is None, reason="the C++ extension is not built")
def test_the_extension_refuses_arrays_that_it_would_have_to_copy():
    spread = np.zeros(6, np.uint32)[::2]
    with pytest.raises(TypeError, match="contiguous uint32"):
        dtw(spread, GOOD[1], *GOOD)
    odd = np.frombuffer(b"\0" + GOOD[0].tobytes(), np.uint8)[1:].view(np.uint32)
    with pytest.raises(ValueError, match="aligned"):
        dtw(odd, GOOD[1], *GOOD)
