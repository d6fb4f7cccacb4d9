"""FuseLLM's alignment: which tokens it accepts, and which of the source's rows it takes for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_tokenizers import SMALL, Side, distribution, labels, real_chat, side, small_chat

from profuser.alignment.fusellm import FuseLLMAligner, accepted_positions, vocabulary_map
from profuser.alignment.types import (
    ALIGNED,
    INSIDE,
    SAME_SPAN,
    SHARED_PREFIX,
    SKIP_EMPTY,
    SKIP_NO_SOURCE_POSITION,
    SKIP_NOT_MATCHED,
    SKIPPED,
    PrefixRanges,
    SourceCapture,
)
from profuser.errors import DataError
from profuser.text.encoded import Encoded

TOLERANCE = 1e-6  # what float32 log-probabilities allow


def capture_of(tokens: list[tuple[int, int, int]], rows: list[dict[int, float]], k: int | None = None) -> SourceCapture:
    """A capture of `tokens`, each (id, begin, stop), and `rows`, each {id: log-probability} in the capture's order."""
    k = k or max((len(row) for row in rows), default=1)
    top_ids = np.full((len(rows), k), -1, np.int32)
    top_logprobs = np.full((len(rows), k), -np.inf, np.float32)
    for j, row in enumerate(rows):
        top_ids[j, : len(row)], top_logprobs[j, : len(row)] = list(row), list(row.values())
    ids, begin, stop = (np.array(x, np.int32) for x in zip(*tokens)) if tokens else (np.zeros(0, np.int32),) * 3
    return SourceCapture(
        ids=ids,
        begin=begin,
        stop=stop,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        own_logprobs=np.zeros(len(rows), np.float32),
        ranges=PrefixRanges.none(),
    )


def encoded_of(side: Side, *tokens: tuple[str, int, int], end: str | None = None) -> Encoded:
    """An encoding of `tokens`, each (string, begin, stop). `end` is the string of the end of turn."""
    strings = [token for token, _, _ in tokens] + ([] if end is None else [end])
    return Encoded(
        input_ids=[side.vocab[token] for token in strings],
        spans=[(b, f) for _, b, f in tokens],
        start=0,
        stop=len(tokens),
        end_of_turn=None if end is None else len(tokens),
        words=list(range(len(strings))),
    )


# Accepted tokens


def accepted(target: Side, source: Side, tokens: str, own: str, cache: Path) -> list[int]:
    """The source position of each target token, both given as token strings."""
    token_map = vocabulary_map(target, source, cache_dir=cache)
    ids, source_ids = [target.vocab[x] for x in tokens.split()], [source.vocab[x] for x in own.split()]
    mask, position = accepted_positions(ids, source_ids, target, source, token_map)
    assert mask.dtype == bool
    assert position.dtype == np.int32
    np.testing.assert_array_equal(mask, position >= 0)
    return position.tolist()


TARGET = ("▁monday", "▁friday", "▁he", "llo", "▁hello", "▁sat", "▁")
SOURCE = ("Ġmonday", "Ġfriday", "Ġhello", "Ġhe", "llo", "Ġsatt")


def test_equal_tokens_are_accepted(tmp_path):
    assert accepted(side(*TARGET), side(*SOURCE), "▁monday ▁friday ▁monday", "Ġmonday Ġfriday Ġmonday", tmp_path) == [
        0,
        1,
        2,
    ]


def test_tokens_equal_through_the_map_are_accepted(tmp_path):
    assert accepted(side(*TARGET), side(*SOURCE), "▁monday ▁sat ▁friday", "Ġmonday Ġsatt Ġfriday", tmp_path) == [
        0,
        1,
        2,
    ]


def test_a_token_of_several_source_tokens_is_not_accepted(tmp_path):
    assert accepted(side(*TARGET), side(*SOURCE), "▁monday ▁hello ▁friday", "Ġmonday Ġhe llo Ġfriday", tmp_path) == [
        0,
        -1,
        3,
    ]


def test_a_part_of_a_source_token_is_not_accepted(tmp_path):
    assert accepted(side(*TARGET), side(*SOURCE), "▁monday ▁he llo ▁friday", "Ġmonday Ġhello Ġfriday", tmp_path) == [
        0,
        -1,
        -1,
        2,
    ]


def test_a_part_that_resembles_a_neighbour_is_taken_for_it(tmp_path):
    target, source = side("▁the", "▁hello", "▁cat"), side("Ġthe", "Ġhe", "llo", "Ġcat")
    assert accepted(target, source, "▁the ▁hello ▁cat", "Ġthe Ġhe llo Ġcat", tmp_path) == [-1, 2, 3], (
        "of the target's tokens, ▁hello is nearest to llo"
    )


def test_one_source_token_may_speak_for_two_equal_tokens(tmp_path):
    assert accepted(side(*TARGET), side(*SOURCE), "▁monday ▁monday", "Ġmonday", tmp_path) == [0, 0]


def test_a_text_of_no_tokens_accepts_nothing(tmp_path):
    assert accepted(side(*TARGET), side(*SOURCE), "▁monday", "", tmp_path) == [-1]
    assert accepted(side(*TARGET), side(*SOURCE), "", "Ġmonday", tmp_path) == []


# Alignment

RESPONSE = b" monday hello friday"
TARGET_TOKENS = [("▁monday", 0, 7), ("▁hello", 7, 13), ("▁friday", 13, 20)]
SOURCE_TOKENS = [("Ġmonday", 0, 7), ("Ġhe", 7, 10), ("llo", 10, 13), ("Ġfriday", 13, 20)]


def aligned(cache: Path, rows: list[dict[str, float]], *, target_end=True, source_end=True, k=None, **settings):
    """The target and the result for the response above. `rows` has {token: log-probability} for every source token."""
    target, source = side(*TARGET), side(*SOURCE, control=("<end>", "<other>"))
    tokens = [(source.vocab[token], b, f) for token, b, f in SOURCE_TOKENS]
    tokens += [(source.vocab["<end>"], len(RESPONSE), len(RESPONSE))] * source_end
    capture = capture_of(tokens, [{source.vocab[x]: p for x, p in row.items()} for row in rows], k)
    encoded = encoded_of(target, *TARGET_TOKENS, end="<end>" if target_end else None)
    aligner = FuseLLMAligner(target, source, cache_dir=cache, **settings)
    result = aligner.align(RESPONSE, encoded, capture)
    assert result.kind.dtype == result.skip_reason.dtype == np.uint8
    assert result.source_position.dtype == result.ids.dtype == np.int32
    assert result.offsets.dtype == np.int64
    assert result.logprobs.dtype == result.tail.dtype == result.reliability.dtype == np.float32
    assert len(result.offsets) == len(encoded.input_ids) + 1
    return target, result


def named(target: Side, result, t: int) -> dict[str, float]:
    names = {i: token for token, i in target.vocab.items()}
    return {names[i]: p for i, p in distribution(result, t).items()}


ROW = {"Ġmonday": np.log(0.4), "Ġfriday": np.log(0.2), "<other>": np.log(0.1)}


def test_accepted_rows_are_mapped_and_renormalised(tmp_path):
    target, result = aligned(tmp_path, [ROW] * 5)
    for t in (0, 1, 3):
        assert named(target, result, t) == pytest.approx({"▁monday": 2 / 3, "▁friday": 1 / 3}, abs=TOLERANCE)
        assert list(named(target, result, t)) == ["▁monday", "▁friday"], "entries come in falling probability"
    assert result.tail.tolist() == [0, 0, 1, 0]
    assert result.reliability.tolist() == [1, 1, 0, 1]


def test_a_row_is_accepted_by_the_token_in_front_of_it(tmp_path):
    """▁monday and ▁friday are matched with source tokens 0 and 3. ▁hello, the source's Ġhe and llo, is not matched."""
    rows = [{token: -0.1} for token in ("Ġmonday", "Ġhello", "Ġmonday", "Ġfriday", "<end>")]
    target, result = aligned(tmp_path, rows)
    assert result.source_position.tolist() == [0, 1, -1, 4]
    assert result.skip_reason.tolist() == [ALIGNED, ALIGNED, SKIP_NOT_MATCHED, ALIGNED]
    assert named(target, result, 1) == {"▁hello": 1.0}, "▁hello is not matched, but ▁monday in front of it is"
    assert named(target, result, 2) == {}, "▁friday is matched, but ▁hello in front of it is not"
    assert named(target, result, 3) == {"<end>": 1.0}, "the last token is matched"
    assert result.kind.tolist() == [SAME_SPAN, SHARED_PREFIX, SKIPPED, SAME_SPAN]


def test_the_row_behind_a_match_is_taken_and_not_the_next_match(tmp_path):
    """Both ▁monday are matched with source token 0, so the row behind it is taken twice, even as that of the end of turn."""
    target, source = side(*TARGET), side(*SOURCE)
    rows = [{source.vocab["Ġfriday"]: -0.1}, {0: -0.1}]
    encoded = encoded_of(target, ("▁monday", 0, 3), ("▁monday", 3, 7), end="<end>")
    aligner = FuseLLMAligner(target, source, cache_dir=tmp_path)
    result = aligner.align(b" monday", encoded, capture_of([(source.vocab["Ġmonday"], 0, 7), (0, 7, 7)], rows))
    assert result.source_position.tolist() == [0, 1, 1]
    assert [named(target, result, t) for t in range(3)] == [{"▁friday": 1.0}, {"<end>": 1.0}, {"<end>": 1.0}]


@pytest.mark.parametrize("fallback", ["skip", "label"])
def test_a_row_beyond_the_sources_last_is_skipped(fallback, tmp_path):
    target, source = side(*TARGET), side(*SOURCE)
    encoded = encoded_of(target, ("▁monday", 0, 3), ("▁monday", 3, 7), end="<end>")
    aligner = FuseLLMAligner(target, source, cache_dir=tmp_path, fallback=fallback)
    result = aligner.align(b" monday", encoded, capture_of([(source.vocab["Ġmonday"], 0, 7)], [{0: -0.1}]))
    assert result.source_position.tolist() == [0, -1, -1]
    assert result.kind.tolist() == [SHARED_PREFIX, SKIPPED, SKIPPED]
    if fallback == "skip":
        assert result.skip_reason.tolist() == [ALIGNED, SKIP_NO_SOURCE_POSITION, SKIP_NO_SOURCE_POSITION]
        assert named(target, result, 1) == named(target, result, 2) == {}
    else:
        assert result.skip_reason.tolist() == [ALIGNED] * 3
        assert [named(target, result, t) for t in (1, 2)] == [{"▁monday": 1.0}, {"<end>": 1.0}]


def test_an_end_of_turn_after_a_token_without_a_match_is_skipped(tmp_path):
    target, source = side(*TARGET), side(*SOURCE)
    encoded = encoded_of(target, ("▁monday", 0, 7), ("▁he", 7, 10), ("llo", 10, 13), end="<end>")
    tokens = [(source.vocab["Ġmonday"], 0, 7), (source.vocab["Ġhello"], 7, 13), (0, 13, 13)]
    aligner = FuseLLMAligner(target, source, cache_dir=tmp_path)
    result = aligner.align(b" monday hello", encoded, capture_of(tokens, [{0: -0.1}] * 3))
    assert result.source_position.tolist() == [0, 1, -1, -1]
    assert result.skip_reason.tolist() == [ALIGNED, ALIGNED, SKIP_NOT_MATCHED, SKIP_NOT_MATCHED]


def test_of_colliding_entries_the_larger_is_kept(tmp_path):
    row = {"Ġcat": np.log(0.1), "Ġhello": np.log(0.3), "llo": np.log(0.05), "Ġhe": np.log(0.2)}
    target, source = side("▁he", "▁cat", "▁sat"), side("Ġhello", "Ġhe", "Ġcat", "llo")
    capture = capture_of([(source.vocab["Ġhe"], 0, 3)], [{source.vocab[x]: p for x, p in row.items()}])
    result = FuseLLMAligner(target, source, cache_dir=tmp_path).align(
        b" he", encoded_of(target, ("▁he", 0, 3)), capture
    )
    mapped = vocabulary_map(target, source, cache_dir=tmp_path)
    assert (
        mapped[source.vocab["Ġhello"]]
        == mapped[source.vocab["Ġhe"]]
        == mapped[source.vocab["llo"]]
        == target.vocab["▁he"]
    )
    assert named(target, result, 0) == pytest.approx({"▁he": 0.75, "▁cat": 0.25}, abs=TOLERANCE)


def test_only_the_top_k_entries_count(tmp_path):
    row = {"Ġsatt": np.log(0.1), "Ġmonday": np.log(0.5), "Ġfriday": np.log(0.2)}
    target, result = aligned(tmp_path, [row] * 5, top_k=2)
    assert named(target, result, 0) == pytest.approx({"▁monday": 5 / 7, "▁friday": 2 / 7}, abs=TOLERANCE)
    target, result = aligned(tmp_path, [row] * 5, top_k=1)
    assert named(target, result, 0) == {"▁monday": 1.0}


def test_padding_and_ids_beyond_the_tokenizer_are_left_out(tmp_path):
    target, source = side(*TARGET), side(*SOURCE)
    capture = capture_of([(source.vocab["Ġmonday"], 0, 7)], [{source.vocab["Ġfriday"]: -1.0, 10**6: -0.5}], k=5)
    align = FuseLLMAligner(target, source, cache_dir=tmp_path).align
    result = align(b" monday", encoded_of(target, ("▁monday", 0, 7)), capture)
    assert named(target, result, 0) == {"▁friday": 1.0}


def test_a_position_with_nothing_to_map_is_skipped(tmp_path):
    rows = [{"<other>": -0.1}, *[ROW] * 4]
    _, result = aligned(tmp_path, rows)
    assert result.skip_reason[0] == SKIP_EMPTY
    assert result.kind[0] == SAME_SPAN
    assert result.offsets[1] == 0
    target, result = aligned(tmp_path, rows, fallback="label")
    assert named(target, result, 0) == {"▁monday": 1.0}


def test_the_label_fallback_is_one_hot_on_the_rows_own_token(tmp_path):
    target, result = aligned(tmp_path, [ROW] * 4, source_end=False, fallback="label")
    assert named(target, result, 2) == {"▁friday": 1.0}
    assert named(target, result, 3) == {"<end>": 1.0}
    assert result.kind.tolist() == [SAME_SPAN, SHARED_PREFIX, SKIPPED, SKIPPED], "a label is not an alignment"
    assert result.source_position.tolist() == [0, 1, -1, -1]
    assert result.skip_reason.tolist() == [ALIGNED] * 4
    assert result.tail.tolist() == [0] * 4
    assert result.reliability.tolist() == [1] * 4


def test_end_of_turn_matches_end_of_turn_by_role(tmp_path):
    end_row = {"<end>": np.log(0.6), "Ġfriday": np.log(0.2)}
    target, result = aligned(tmp_path, [*[ROW] * 4, end_row])
    assert result.source_position[3] == 4
    assert named(target, result, 3) == pytest.approx({"<end>": 0.75, "▁friday": 0.25}, abs=TOLERANCE)


def test_several_end_tokens_of_the_source_count_for_the_targets_own(tmp_path):
    target = side("▁a", control=("<s>", "</s>"), end="</s>")
    target.end_ids = (0, 1)
    source = side("Ġa", control=("<eot>", "<eos>"), end="<eot>")
    source.end_ids = (0, 1)
    row = {0: np.log(0.3), 1: np.log(0.5), 2: np.log(0.1)}
    capture = capture_of([(2, 0, 2), (1, 2, 2)], [row, row])
    for gold in target.end_ids:
        aligner = FuseLLMAligner(target, source, cache_dir=tmp_path)
        encoded = encoded_of(target, ("▁a", 0, 2), end=("<s>", "</s>")[gold])
        result = aligner.align(b" a", encoded, capture)
        assert distribution(result, 0) == pytest.approx({1: 5 / 6, 2: 1 / 6}, abs=TOLERANCE), (
            "before the end they become the target's end_id"
        )
        assert distribution(result, 1) == pytest.approx({gold: 5 / 6, 2: 1 / 6}, abs=TOLERANCE), (
            "at the end they become the label"
        )


def test_a_cut_response_has_no_end_of_turn(tmp_path):
    _, result = aligned(tmp_path, [ROW] * 5, target_end=False)
    assert result.source_position.tolist() == [0, 1, -1]
    _, result = aligned(tmp_path, [ROW] * 4, source_end=False)
    assert result.source_position.tolist() == [0, 1, -1, -1]
    assert result.skip_reason[3] == SKIP_NO_SOURCE_POSITION
    assert result.kind[3] == SKIPPED


def test_an_empty_response_aligns_its_end_of_turn(tmp_path):
    target, source = side("▁a"), side("Ġa")
    align = FuseLLMAligner(target, source, cache_dir=tmp_path).align
    result = align(b"", encoded_of(target, end="<end>"), capture_of([(0, 0, 0)], [{0: -0.1}]))
    assert distribution(result, 0) == {0: 1.0}
    assert (result.kind.tolist(), result.source_position.tolist()) == ([SAME_SPAN], [0])
    result = align(b"", encoded_of(target, end="<end>"), capture_of([], []))
    assert (result.kind.tolist(), result.skip_reason.tolist()) == ([SKIPPED], [SKIP_NO_SOURCE_POSITION])
    result = align(b"", encoded_of(target), capture_of([], []))
    assert len(result.kind) == len(result.source_position) == len(result.skip_reason) == 0
    assert result.offsets.tolist() == [0]


@pytest.mark.parametrize(
    ("own", "kind"),
    [
        ([("Ġsa", 0, 3), ("tx", 3, 5)], INSIDE),
        (
            [("Ġsa", 0, 3), ("t", 3, 4), ("x", 4, 5)],
            SAME_SPAN,
        ),  # the span is that of source token 2, but row 1 is taken
    ],
)
def test_kind_is_that_of_the_spans_whichever_row_is_taken(own, kind, tmp_path):
    """▁sat is matched with Ġsa. So row 1 is what the source says behind ` sa`, and not behind ` sat`."""
    target, source = side("▁sat", "x", "tx"), side("Ġsa", "Ġx", "tx", "x", "t")
    capture = capture_of([(source.vocab[token], b, f) for token, b, f in own], [{source.vocab["tx"]: -0.1}] * len(own))
    encoded = encoded_of(target, ("▁sat", 0, 4), ("x", 4, 5))
    result = FuseLLMAligner(target, source, cache_dir=tmp_path).align(b" satx", encoded, capture)
    assert result.source_position.tolist() == [0, 1]
    assert result.kind.tolist() == [SHARED_PREFIX, kind]
    assert named(target, result, 1) == {"tx": 1.0}


@pytest.mark.parametrize("name", SMALL)
def test_one_tokenizer_on_both_sides_accepts_every_row(name, tmp_path):
    chat = small_chat(name)
    response = "hello world, the answer is 42.\n  你好 🙂"
    encoded = chat.encode("x", response)
    ids = labels(encoded)
    n = len(response.encode())
    spans = [*encoded.spans, (n, n)]
    capture = capture_of([(i, b, f) for i, (b, f) in zip(ids, spans)], [{i: -0.5, ids[0]: -2.0} for i in ids])
    aligner = FuseLLMAligner(chat, chat, cache_dir=tmp_path)
    result = aligner.align(response.encode(), encoded, capture)
    assert result.source_position.tolist() == list(range(len(ids)))
    assert (result.kind == SAME_SPAN).all()
    distributions = [distribution(result, t) for t in range(len(ids))]
    assert [max(entries, key=entries.__getitem__) for entries in distributions] == ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a["encoded"].input_ids.__setitem__(0, 99), r"a target id must be in \[0, 8\).* got 99"),
        (lambda a: a["encoded"].input_ids.__setitem__(0, -1), "got -1"),
        (lambda a: a["encoded"].spans.clear(), "one span per token"),
        (lambda a: a["capture"].ids.fill(99), "source ids must be"),
        (lambda a: setattr(a["capture"], "begin", np.zeros(3, np.int32)), "one row per token"),
        (lambda a: setattr(a["capture"], "top_logprobs", np.zeros((1, 9), np.float32)), "one row per token"),
        (lambda a: a["capture"].top_logprobs.fill(0.5), "top_logprobs must be natural log-probabilities, got 0.5"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change, message, tmp_path):
    target, source = side(*TARGET), side(*SOURCE)
    arguments = {
        "response": b" monday",
        "encoded": encoded_of(target, ("▁monday", 0, 7)),
        "capture": capture_of([(source.vocab["Ġmonday"], 0, 7)], [{1: -0.1}]),
    }
    aligner = FuseLLMAligner(target, source, cache_dir=tmp_path)
    aligner.align(**arguments)
    change(arguments)
    with pytest.raises(DataError, match=message):
        aligner.align(**arguments)


def test_a_batch_is_one_response_after_the_other(tmp_path):
    target, source = side(*TARGET), side(*SOURCE)
    responses = [b" monday", b""]
    encoded = [encoded_of(target, ("▁monday", 0, 7), end="<end>"), encoded_of(target, end="<end>")]
    captures = [
        capture_of([(source.vocab["Ġmonday"], 0, 7), (0, 7, 7)], [{0: -0.1}] * 2),
        capture_of([(0, 0, 0)], [{0: -0.1}]),
    ]
    aligner = FuseLLMAligner(target, source, cache_dir=tmp_path)
    results = aligner.align_batch(responses, encoded, captures)
    assert [result.source_position.tolist() for result in results] == [[0, 1], [0]]
    with pytest.raises(ValueError, match="zip"):
        aligner.align_batch(responses, encoded, captures[:1])


@pytest.mark.parametrize("settings", [{"top_k": 0}, {"fallback": "one-hot"}])
def test_settings_out_of_range_are_refused(settings, tmp_path):
    with pytest.raises(ValueError, match=str(next(iter(settings.values())))):
        FuseLLMAligner(side("▁a"), side("Ġa"), cache_dir=tmp_path, **settings)


# Real tokenizers

TEXTS = {
    "en": "The keeper's daughter counted boats the way other children count sheep, and she wrote the number in pencil.",
    "zh": "老王在巷口修了三十二年的自行车。他的摊子很小，一把遮阳伞、一个工具箱、两只矮板凳。",
}


@pytest.mark.long
def test_real_tokenizers_agree_on_english_and_not_on_chinese(tmp_path_factory):
    target, source = real_chat("llama2", "llama2"), real_chat("gpt_neox", "vicuna")
    token_map = vocabulary_map(target, source, cache_dir=tmp_path_factory.getbasetemp())
    share = {}
    for language, text in TEXTS.items():
        own = source.encode("x", text)
        encoded = target.encode("x", text)
        ids, source_ids = labels(encoded)[:-1], labels(own)[:-1]
        mask, position = accepted_positions(ids, source_ids, target, source, token_map)
        share[language] = mask.mean()
        strings = target.tokenizer.convert_ids_to_tokens(ids)
        own_strings = source.tokenizer.convert_ids_to_tokens(source_ids)
        for t in np.nonzero(mask)[0]:
            assert token_map[source_ids[position[t]]] == ids[t]
            string = own_strings[position[t]].replace("Ġ", "▁")
            assert string == strings[t] or string not in target.tokenizer.get_vocab()
    assert share["en"] > 0.5
    assert share["zh"] < 0.1
