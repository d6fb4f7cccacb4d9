"""Numbers that a source was asked for (rule 9): what it says is its own probability, and both engines use it alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from alignment_checks import TOLERANCE, assert_same, certain, chain_chat, check_mass, token
from small_tokenizers import capture_of, distribution, real_chat
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
)

from profuser import align, follow_numbers, prefix_ranges, source_topk
from profuser.alignment.engine import byte_aligner
from profuser.alignment.follow_numbers import FOLLOWED, NumberFollower, number_rows
from profuser.alignment.numbers import number_ids, numbers
from profuser.alignment.reference import PythonByteAligner
from profuser.alignment.types import NUMBERS, PrefixRanges
from profuser.errors import ConfigError, DataError
from profuser.models.branches import Branches
from profuser.models.head import head_of
from profuser.models.load import chat_format, load_model, load_tokenizer
from profuser.recipe.schema import AlignConfig, SourceConfig

SHORT = [f"{n:0{length}}" for length in (2, 3) for n in range(10**length)]
SOFTER = 0.3  # the demo's sources are so sure of their digits that little could be compared
RESPONSE = "7 or 31? 245, 9 and 604."


@pytest.fixture(scope="module")
def reckoner():
    config = SourceConfig(name="reckoner", model="demo:reckoner")
    return load_model(config, torch.float32), chat_format(config)


def brute_force(model, chat, ids: list[int], most: int) -> dict[bytes, float]:
    """The probabilities of all numbers behind some tokens. The whole text is read anew for every one of them."""
    own = ids[-1]
    digit_ids = [i for i, piece in enumerate(chat.token_bytes.pieces) if piece and piece.isdigit()]  # byte tokens, too
    found: dict[bytes, float] = {}
    waiting: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
    while waiting:
        tokens, mass = waiting.pop()
        with torch.no_grad():
            logits = model(torch.tensor([[*ids[:-1], *tokens]])).logits[0, -1]
        follow = (SOFTER * logits.double()).softmax(-1)[digit_ids].tolist()
        if tokens:
            number = chat.token_bytes.of(tokens)
            found[number] = found.get(number, 0.0) + mass * (1 - sum(follow))
        for i, p in zip(digit_ids, follow):
            reached, longer = mass * p, (*tokens, i)
            if longer == (own,):
                continue
            if len(longer) == most:
                number = chat.token_bytes.of(longer)
                found[number] = found.get(number, 0.0) + reached
            elif reached >= FOLLOWED:
                waiting.append((longer, reached))
    return found


def test_the_numbers_of_a_row_have_the_probabilities_of_reading_each_of_them(reckoner):
    model, chat = reckoner
    target = chain_chat(*SHORT)
    encoded, own = target.encode("x", RESPONSE), chat.encode("Eve has 8 eggs and loses 4.", RESPONSE)
    rows = number_rows(target.token_bytes, encoded, chat.token_bytes, own)
    head = replace(head_of(model), logit_scale=SOFTER)
    found = NumberFollower(target.token_bytes, chat.token_bytes, model, head, 10).follow(own, rows)
    assert found.rows.tolist() == [of.row for of in rows]
    base = len(target.token_bytes.pieces) + len(chat.token_bytes.pieces)
    listed = 0
    for n, of in enumerate(rows):
        position = own.label_positions[of.row]
        expected = brute_force(model, chat, own.input_ids[: position + 1], of.most)
        ids = [i - base for i in found.ids[n].tolist() if i >= 0]
        said = dict(zip((numbers()[i] for i in ids), np.exp(found.logprobs[n].astype(float)).tolist()))
        assert said == pytest.approx({number: expected[number] for number in said}, abs=1e-5)
        # Those that are left out are less probable, and no number with a probability is forgotten.
        least = min(said.values(), default=0) if len(said) == 10 else 1e-5
        assert all(p <= least + 1e-5 for number, p in expected.items() if number not in said)
        listed += len(said)
    assert listed > 30


def test_digits_that_the_targets_token_holds_already_are_not_asked_for_again():
    """The target writes up to three digits in one token. Behind `12` of `123` only one more is of interest."""
    target, source = chain_chat(*SHORT), chain_chat("ab")
    response = "x=123.45 6"
    encoded, own = target.encode("x", response), source.encode("x", response)
    pieces = [source.token_bytes.pieces[i] for i in own.input_ids[own.start : own.stop]]
    rows = {of.row: of.most for of in number_rows(target.token_bytes, encoded, source.token_bytes, own)}
    assert pieces == [b"x", b"=", b"1", b"2", b"3", b".", b"4", b"5", b" ", b"6"]
    assert rows == {2: 3, 3: 2, 4: 1, 5: 3, 6: 3, 7: 2, 8: 1, 9: 3, 10: 3}
    assert not number_rows(source.token_bytes, own, target.token_bytes, encoded)


def followed(target, source, response, rows, numbers_of_row: dict[int, dict[str, float]], **settings):
    """Aligns full distributions together with numbers, in both engines."""
    encoded, own = target.encode("x", response), source.encode("x", response)
    capture = capture_of(source, own, len(response.encode()), rows, max(map(len, rows)), (target, encoded))
    width = max(map(len, numbers_of_row.values()))
    base = len(target.token_bytes.pieces) + len(source.token_bytes.pieces)
    ids, logprobs = np.full((len(numbers_of_row), width), -1, np.int32), np.full((len(numbers_of_row), width), -np.inf)
    for n, of_row in enumerate(numbers_of_row.values()):
        ids[n, : len(of_row)] = [base + number_ids()[number.encode()] for number in of_row]
        logprobs[n, : len(of_row)] = np.log(list(of_row.values()))
    capture.ranges = capture.ranges.with_others(
        PrefixRanges(
            rows=np.array(list(numbers_of_row), np.int32),
            strip=np.full(len(ids), NUMBERS, np.int32),
            logmass=np.log([sum(of_row.values()) for of_row in numbers_of_row.values()]).astype(np.float32),
            ids=ids,
            logprobs=logprobs.astype(np.float32),
        )
    )
    aligned, oracle = (
        engine(target, source, **{"top_k": 1000, **settings}).align(response.encode(), encoded, capture)
        for engine in (byte_aligner, PythonByteAligner)
    )
    assert_same(aligned, oracle)
    return aligned


def test_numbers_take_the_place_of_the_candidates_that_are_digits():
    """The source writes `4` and then a further digit with 0.75, which the target would write as one token."""
    target, source = chain_chat(*SHORT), chain_chat("ab")
    rows = certain(source, "x=12.")
    one, two = token(source, "1"), token(source, "2")
    rows[2] = {one: 0.5, token(source, "4"): 0.4, token(source, "."): 0.1}
    rows[3] = {two: 0.3, token(source, "3"): 0.2, token(source, "."): 0.5}
    aligned = followed(
        target,
        source,
        "x=12.",
        rows,
        {2: {"4": 0.1, "47": 0.2, "481": 0.05}, 3: {"3": 0.15, "31": 0.04}},
    )
    check_mass(aligned)
    # At row 3 the numbers stand behind `1`. What was not followed, 0.05 at row 2 and 0.01 behind the 0.5 of row 3, is in the tail.
    expected = {"12": 0.15, "13": 0.5 * 0.15, "131": 0.5 * 0.04, "1": 0.25, "4": 0.1, "47": 0.2, "481": 0.05, ".": 0.1}
    assert distribution(aligned, 2) == pytest.approx(
        {token(target, text): p for text, p in expected.items()}, abs=TOLERANCE
    )
    assert aligned.tail[2] == pytest.approx(0.05 + 0.5 * 0.01, abs=TOLERANCE)


def test_numbers_behind_the_gold_token_are_merged_with_it():
    target, source = chain_chat(*SHORT), chain_chat("ab")
    rows = certain(source, "x=1.")
    rows[2] = {token(source, "1"): 0.5, token(source, "."): 0.5}
    rows[3] = {token(source, "."): 0.6, token(source, "2"): 0.4}
    aligned = followed(target, source, "x=1.", rows, {3: {"2": 0.1, "23": 0.3}})
    expected = {"1": 0.3, "12": 0.05, "123": 0.15, ".": 0.5}
    assert distribution(aligned, 2) == pytest.approx(
        {token(target, text): p for text, p in expected.items()}, abs=TOLERANCE
    )


def test_a_number_with_a_space_in_front_counts_for_the_targets_token_with_one():
    target = chain_chat(*(f" {n}" for n in range(100)))
    source = chain_chat(*(f" {n}" for n in range(10)))
    rows = certain(source, "x 1.")
    rows[1] = {token(source, " 1"): 0.5, token(source, " 7"): 0.5}
    aligned = followed(target, source, "x 1.", rows, {1: {" 7": 0.1, " 72": 0.4}})
    expected = {" 1": 0.5, " 7": 0.1, " 72": 0.4}
    assert distribution(aligned, 1) == pytest.approx(
        {token(target, text): p for text, p in expected.items()}, abs=TOLERANCE
    )


def test_ids_beyond_the_vocabulary_are_no_numbers():
    """A model may pad its logits. Such ids lie where numbers have theirs, and their mass must stay in the tail."""
    target, source = chain_chat(*SHORT), chain_chat("ab")
    rows = certain(source, "x=1.")
    rows[2] = {token(source, "1"): 0.5, len(source.token_bytes.pieces) + 3: 0.5}
    encoded, own = target.encode("x", "x=1."), source.encode("x", "x=1.")
    capture = capture_of(source, own, 4, rows, 2, (target, encoded))
    for engine in (byte_aligner, PythonByteAligner):
        aligned = engine(target, source).align(b"x=1.", encoded, capture)
        assert distribution(aligned, 2) == pytest.approx({token(target, "1"): 0.5}, abs=TOLERANCE)


def models():
    small = {
        "vocab_size": 90,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    heads = {"num_key_value_heads": 2, "head_dim": 8}
    # The text has 20 tokens. A window is shorter than it, is filled by it, is filled by its branches, or is never filled.
    windows = {
        f"{name} with a window of {window}": config(**small, **heads, sliding_window=window)
        for name, config, window in (
            ("mistral", MistralConfig, 8),
            ("mistral", MistralConfig, 20),
            ("mistral", MistralConfig, 24),
            ("mistral", MistralConfig, 4096),
            ("gemma2", Gemma2Config, 8),  # every other layer has a window
            ("gemma2", Gemma2Config, 4096),
            ("gemma3", Gemma3TextConfig, 22),
        )
    }
    return {"llama": LlamaConfig(**small), "gpt_neox": GPTNeoXConfig(**small)} | windows


@pytest.mark.parametrize("name", list(models()))
def test_a_branch_has_the_state_of_the_whole_sequence(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models()[name]).eval()
    ids = torch.randint(90, (20,)).tolist()
    read = Branches(model, ids, "")
    read.check()
    branches = [(20, (3,)), (20, (3, 4)), (20, (3, 5, 6)), (7, ()), (7, (ids[7], 8)), (1, (2, 2)), (12, (1,))]
    for chosen in (branches, branches[::-1]):
        for (cut, tokens), state in zip(chosen, read.states(chosen), strict=True):
            with torch.no_grad():
                whole = model.base_model(torch.tensor([[*ids[:cut], *tokens]])).last_hidden_state[0, -1]
            torch.testing.assert_close(state, whole, rtol=1e-4, atol=1e-5)
        read.forget()


@pytest.mark.parametrize("name", list(models()))
def test_another_text_is_read_from_where_it_differs(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(models()[name]).eval()
    first, read = torch.randint(90, (20,)).tolist(), Branches(model, [5], "")
    for ids in (first, first[:12], [*first[:12], 7, 8, 9], [*first[:3], 1], first):
        read.become(ids)
        with torch.no_grad():
            whole = model.base_model(torch.tensor([ids])).last_hidden_state[0]
            branch = model.base_model(torch.tensor([[*ids[:3], 4, 6]])).last_hidden_state[0, -1]
        torch.testing.assert_close(read.hidden, whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(read.states([(3, (4, 6))])[0], branch, rtol=1e-4, atol=1e-5)


def test_a_model_without_branches_is_refused_in_one_line():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2)).eval()
    with pytest.raises(DataError, match=r"Mamba.*follow_numbers"):
        Branches(model, list(range(20)), "leave out align.follow_numbers").check()


def test_public_functions_use_the_numbers(reckoner):
    """Of single digits, much mass is in the tail. With the numbers asked for, none that a distribution can hold is."""
    model, _ = reckoner
    source, target = load_tokenizer(SourceConfig(name="r", model="demo:reckoner")), real_chat("deepseek_v3", "vicuna")
    messages = [{"role": "user", "content": "Eve has 8 eggs, loses 4."}, {"role": "assistant", "content": RESPONSE}]
    needed = prefix_ranges(messages, target.tokenizer, source)
    with torch.no_grad():
        hidden = model.base_model(needed.input_ids[None]).last_hidden_state[0, needed.positions - 1]
        labels = needed.input_ids[needed.positions]
        ids, logprobs, _, ce, *of_ranges = source_topk(
            hidden, model.get_output_embeddings().weight, labels, 10, ranges=needed
        )
    asked = follow_numbers(messages, target.tokenizer, source, model)
    estimated, told = (
        align(messages, target.tokenizer, source, ids, logprobs, -ce, of_ranges, numbers=numbers)
        for numbers in (None, asked)
    )
    pieces = target.token_bytes.pieces
    first = [t for t, i in enumerate(told.target_ids.tolist()) if (pieces[i] or b"").isdigit()]
    assert told.source_tail[first].mean() < 0.5 * estimated.source_tail[first].mean()
    # What is said of the gold tokens was exact before.
    compared = 0
    for t in first:
        before, now = (dict(zip(of.source_ids[t].tolist(), of.source_logprobs[t].tolist())) for of in (estimated, told))
        if (gold := int(told.target_ids[t])) in now and gold in before:
            assert now[gold] == pytest.approx(before[gold], abs=1e-3)
            compared += 1
    assert compared


def test_a_mode_that_does_not_follow_numbers_is_named():
    with pytest.raises(ConfigError, match=r"follow_numbers must go with align.mode bytes"):
        AlignConfig(mode="fusellm", follow_numbers=True)


def test_rows_without_numbers_cost_nothing(reckoner):
    model, chat = reckoner
    follower = NumberFollower(chain_chat(*SHORT).token_bytes, chat.token_bytes, model, head_of(model), 10)
    assert not len(follower.follow(chat.encode("x", "a stone."), []).rows)
