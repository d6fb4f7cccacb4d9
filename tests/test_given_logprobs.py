"""Top-k log-probabilities that a user has already: the source is not run, and what does not fit its tokenizer is named."""

import copy
import csv
import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_given import given_files, written

from profuser.errors import ConfigError, DataError
from profuser.models.load import chat_format
from profuser.prepare.capture import unpack_captures
from profuser.prepare.capture_shards import taken
from profuser.prepare.data import plain
from profuser.prepare.given_logprobs import GivenLogprobs
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import prepare
from profuser.prepare.votes import count_votes
from profuser.progress import Progress
from profuser.ragged import offsets_of
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.store.division import Part
from profuser.store.marks import rows_of
from profuser.text.fit import Fitted, Verdict

K = 10
PROMPT, RESPONSE = "Which place has a wetab?", "A wetab is a stone."
WHOLE = Fitted(RESPONSE, cut=False, verdict=Verdict.OK)


def captured(store, kind):
    return store.by_example(kind, lambda number: unpack_captures(store.get(kind, number)))


def in_order(capture):
    """The most probable tokens of every row, the lower id first where two are equally probable."""
    order = np.lexsort((capture.top_ids, -capture.top_logprobs))
    return np.take_along_axis(capture.top_ids, order, 1)


def own_form(capture) -> dict:
    """The response's tokens alone, as lists. A token's own log-probability is left out where it is among the most probable."""
    among = [i in top for i, top in zip(capture.ids, capture.top_ids.tolist())]
    own = [None if known else float(x) for known, x in zip(among, capture.own_logprobs)]
    return {
        "token_ids": capture.ids.tolist(),
        "top_ids": capture.top_ids.tolist(),
        "top_logprobs": capture.top_logprobs.tolist(),
        "logprobs": own,
    }


def as_vllm(capture, encoded) -> dict:
    """The whole conversation, as vLLM returns it: the token itself is there whether it is among the most probable or not."""
    said: list = [None] * len(encoded.input_ids)
    for j, n in enumerate(encoded.label_positions):
        order = np.argsort(-capture.top_logprobs[j], kind="stable")
        said[n] = {
            str(capture.top_ids[j, x]): {
                "logprob": float(capture.top_logprobs[j, x]),
                "rank": rank,
                "decoded_token": "x",
            }
            for rank, x in enumerate(order, start=1)
        }
        own = str(capture.ids[j])
        said[n].setdefault(own, {"logprob": float(capture.own_logprobs[j]), "rank": 99, "decoded_token": "x"})
    return {"prompt_token_ids": encoded.input_ids, "prompt_logprobs": said}


@pytest.fixture(scope="module")
def given(prepared, tmp_path_factory):
    """(run, store): the small recipe once more, where every answer, score and log-probability is in a file."""
    _, run, expected = prepared
    folder = tmp_path_factory.mktemp("given")
    sources, judges = given_files(prepared, folder)
    inputs, ballots = Inputs.open(run), count_votes(expected, run.recipe)
    for s, source in enumerate(sources):
        chat, rows = inputs.chats[source.name], []
        for split in inputs.rows:
            for row, found in zip(
                inputs.rows[split], captured(expected, layout.truth(split, source.name)), strict=True
            ):
                if found is not None:
                    encoded = chat.encode(row["prompt"], row["response"])
                    form = own_form(found.capture) if s else as_vllm(found.capture, encoded)
                    rows.append({"prompt": f" {row['prompt']}\n", "response": row["response"]} | form)
        for e, found in enumerate(captured(expected, layout.winners(source.name))):
            if found is not None:
                row = {"prompt": inputs.rows["train"][e]["prompt"], "response": ballots.winning_text(e)}
                rows.append(row | own_form(found.capture))
        half = len(rows) // 2
        for n, part in enumerate((rows[:half], rows[half:])):
            written(folder / f"{source.name}-top-{n}.jsonl", *part)
        sources[s] = replace(source, logprobs=str(folder / f"{source.name}-top-*.jsonl"))
        if source.name != run.recipe.target:  # of a source that is not run no weights are needed
            model = shutil.copytree(
                resolve(source.model), folder / source.name, ignore=shutil.ignore_patterns("*.safetensors")
            )
            sources[s] = replace(sources[s], model=str(model))
    recipe = replace(run.recipe, sources=sources, judges=judges, store=str(folder / "store"))
    run = replace(run, recipe=recipe)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "profuser.prepare.capture_shards.load_model", lambda *_, **__: pytest.fail("a model was loaded")
        )
        return run, prepare(run)


def test_no_model_is_loaded_and_the_captures_are_those_of_the_model(prepared, given):
    store, expected = given[1], prepared[2]
    names = [source.name for source in given[0].recipe.sources]
    kinds = [layout.truth(split, name) for split in ("train", "validation", "heldout") for name in names]
    seen = 0
    for kind in (*kinds, *map(layout.winners, names)):
        for ours, theirs in zip(captured(store, kind), captured(expected, kind), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                seen += 1
                assert (ours.tokens, ours.response_bytes) == (theirs.tokens, theirs.response_bytes)
                assert ours.nll == pytest.approx(theirs.nll, abs=2e-2)  # the best are stored in fp16
                for name in ("ids", "begin", "stop", "top_logprobs"):
                    assert np.array_equal(getattr(ours.capture, name), getattr(theirs.capture, name)), name
                # Rounding to fp16 has made ties, of which the lower id comes first.
                assert np.array_equal(ours.capture.top_ids, in_order(theirs.capture))
                assert len(ours.capture.ranges.rows) == 0
    assert seen > 50


def test_the_targets_of_the_source_with_the_same_tokenizer_are_the_same(prepared, given):
    """Its distributions need no ranges. Of another tokenizer's no target token that begins inside a source's token has any."""
    store, expected = given[1], prepared[2]
    target = [source.name for source in given[0].recipe.sources].index(given[0].recipe.target)
    for split in ("train", "validation"):
        for number in store.numbers(layout.targets(split)):
            ours, theirs = (s.get(layout.targets(split), number) for s in (store, expected))
            assert np.array_equal(ours["input_ids"], theirs["input_ids"])
            at = [np.flatnonzero(source_of_rows(x) == target) for x in (ours, theirs)]
            assert len(at[0]) == len(at[1]) > 0
            for rows, x in zip(at, (ours, theirs)):
                offsets = offsets_of(x["entry_counts"])
                x["of"] = np.concatenate([x["entry_ids"][slice(*offsets[r : r + 2])] for r in rows])
            assert np.array_equal(ours["of"], theirs["of"])
            inside = 2
            assert ours["covered"].sum() < theirs["covered"].sum() or not theirs["kinds"][..., inside].sum()


def source_of_rows(shard):
    return np.concatenate([rows_of(shard["marks"][slice(*at)], 3)[0] for at in pairwise(shard["offsets"])])


def test_where_the_file_changes_the_shards_are_made_again_that_it_says_something_else_about(given, tmp_path):
    """Nothing of the store differs from what a preparation makes that begins with the changed file."""
    run, first = given
    source = next(source for source in run.recipe.sources if source.name == run.recipe.target)
    texts = [Path(source.logprobs.replace("*", part)).read_text() for part in "01"]
    rows = [json.loads(line) for text in texts for line in text.splitlines()]
    inputs, mine = Inputs.open(run), [s.name for s in run.recipe.sources].index(source.name)
    ballots = count_votes(first, run.recipe)
    example = next(e for e in range(len(inputs.rows["train"])) if ballots.winning_source(e) == mine)

    def prepared_from(rows, store):
        file = written(tmp_path / "changed.jsonl", *rows)
        sources = [replace(s, logprobs=str(file)) if s is source else s for s in run.recipe.sources]
        return prepare(replace(run, recipe=replace(run.recipe, sources=sources, store=str(tmp_path / store))))

    def less_sure(split, e, text):
        """The rows, of which that about one text says less of its first token."""
        key = (plain(inputs.rows[split][e]["prompt"]), text)
        changed = copy.deepcopy(rows)
        (row,) = (row for row in changed if (row["prompt"].strip(), row["response"]) == key)
        if "top_logprobs" in row:
            row["top_logprobs"][0] = [x - 1 for x in row["top_logprobs"][0]]
        else:
            for entry in next(filter(None, row["prompt_logprobs"])).values():
                entry["logprob"] -= 1
        return changed

    shutil.copytree(first.directory, tmp_path / "store")
    assert prepared_from(rows[::-1], "store").digests == first.digests
    for kind, changed in (
        (layout.truth("train", source.name), less_sure("train", 0, inputs.rows["train"][0]["response"])),
        (layout.winners(source.name), less_sure("train", example, ballots.winning_text(example))),
    ):
        store = prepared_from(changed, "store")
        ours = {name for name, digest in store.digests.items() if digest != first.digests[name]}
        assert {layout.kind_of(name)[0] for name in ours} == {kind, layout.targets("train")}
        assert len(ours) == 2
        assert store.digests == prepared_from(changed, f"fresh-{kind.folder}").digests


@pytest.fixture(scope="module")
def chat():
    return chat_format(SourceConfig(name="g", model="demo:guardian"))


@pytest.fixture
def row(chat):
    encoded = chat.encode(PROMPT, RESPONSE)
    labels = [encoded.input_ids[i] for i in encoded.label_positions]
    tops = [[label, *(x for x in range(300, 320) if x != label)][:K] for label in labels]
    logprobs = [[math.log(0.5), *[math.log(0.05)] * (K - 1)]] * len(labels)
    return {"prompt": PROMPT, "response": RESPONSE, "token_ids": labels, "top_ids": tops, "top_logprobs": logprobs}


def opened(tmp_path, chat, row, top_k=K):
    return GivenLogprobs("g", written(tmp_path / "top.jsonl", row), chat, top_k)


def said(given, chat, fitted=WHOLE):
    """What a file says about the response, or about what is learnt of it."""
    return given.scored(PROMPT, RESPONSE, fitted, chat.encode(PROMPT, fitted.text, complete=not fitted.cut))


def scored(tmp_path, chat, row, top_k=K):
    return said(opened(tmp_path, chat, row, top_k), chat)


def check_refused(message, act):
    with pytest.raises(DataError) as found:
        act()
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_row_says_what_it_says(tmp_path, chat, row):
    found = scored(tmp_path, chat, row, top_k=4)
    assert found.nll == pytest.approx(len(row["token_ids"]) * math.log(2))
    assert found.capture.top_ids.tolist() == [top[:4] for top in row["top_ids"]]
    assert np.isnan(found.lse).all()


def test_of_equal_log_probabilities_the_lower_id_comes_first(tmp_path, chat, row):
    row["top_ids"] = [top[::-1] for top in row["top_ids"]]
    row["top_logprobs"] = [x[::-1] for x in row["top_logprobs"]]
    found = scored(tmp_path, chat, row)
    assert found.capture.top_ids.tolist() == [[top[-1], *sorted(top[:-1])] for top in row["top_ids"]]


def test_a_token_that_vllm_adds_is_not_one_of_the_best(tmp_path, chat, row):
    encoded = chat.encode(PROMPT, RESPONSE)
    others = {str(x): {"logprob": math.log(0.05), "rank": n} for n, x in enumerate(range(300, 300 + K), start=1)}
    said: list = [None] * len(encoded.input_ids)
    for n in encoded.label_positions:
        assert str(encoded.input_ids[n]) not in others
        said[n] = others | {str(encoded.input_ids[n]): {"logprob": -9.0, "rank": 40}}
    served = {"prompt": PROMPT, "response": RESPONSE, "prompt_token_ids": encoded.input_ids, "prompt_logprobs": said}
    found = scored(tmp_path, chat, served)
    assert found.capture.top_ids.tolist() == [list(range(300, 300 + K))] * found.tokens
    assert found.capture.own_logprobs.tolist() == [-9.0] * found.tokens
    with pytest.raises(
        DataError, match=rf"token {encoded.start} \(from 0\) must have capture.top_k = {K + 1} .* it has {K}"
    ):
        scored(tmp_path, chat, served, top_k=K + 1)


def test_files_of_every_kind_say_the_same(tmp_path, chat, row):
    """A CSV file has lists as JSON. A Parquet file has pairs, or for every token all keys of all tokens, in place of a mapping."""
    encoded = chat.encode(PROMPT, RESPONSE)
    entries: list = [None] * len(encoded.input_ids)
    for n, ids, logprobs in zip(encoded.label_positions, row["top_ids"], row["top_logprobs"]):
        entries[n] = {str(x): {"logprob": y, "rank": r} for r, (x, y) in enumerate(zip(ids, logprobs), start=1)}
    served = {"prompt": PROMPT, "response": RESPONSE, "prompt_token_ids": encoded.input_ids, "prompt_logprobs": entries}
    expected = scored(tmp_path, chat, row)

    for name, form in {"listed": row, "served": served}.items():
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, list(form))
            table.writeheader()
            table.writerow({key: cell if isinstance(cell, str) else json.dumps(cell) for key, cell in form.items()})
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([form]), tmp_path / f"{name}.parquet")
    mapping = pyarrow.map_(
        pyarrow.string(), pyarrow.struct([("logprob", pyarrow.float64()), ("rank", pyarrow.int64())])
    )
    pairs = pyarrow.array([[entry and list(entry.items()) for entry in entries]], pyarrow.list_(mapping))
    columns = {key: [cell] for key, cell in served.items()} | {"prompt_logprobs": pairs}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "pairs.parquet")

    for name in ("listed.csv", "served.csv", "listed.parquet", "served.parquet", "pairs.parquet"):
        found = said(GivenLogprobs("g", str(tmp_path / name), chat, K), chat)
        assert found.nll == expected.nll
        assert np.array_equal(found.capture.top_ids, expected.capture.top_ids)
        assert np.array_equal(found.capture.top_logprobs, expected.capture.top_logprobs)


def test_what_bf16_takes_above_1_is_divided_out(tmp_path, chat, row):
    """Ten tokens of a tenth each, whose logarithms bf16 has rounded up."""
    first = [math.log(0.1) + 2**-7] * K
    rounded = row | {"top_logprobs": [first, *row["top_logprobs"][1:]]}
    assert sum(map(math.exp, first)) == pytest.approx(1.0078, abs=1e-4)
    found = scored(tmp_path, chat, rounded).capture.top_logprobs
    np.testing.assert_allclose(found[0], math.log(0.1), rtol=1e-6)
    np.testing.assert_array_equal(found[1:], np.float32(row["top_logprobs"][1:]))


def test_a_probability_that_rounding_takes_above_1_is_1(tmp_path, chat, row):
    first = [5e-4, *[-50.0] * (K - 1)]
    found = scored(tmp_path, chat, row | {"top_logprobs": [first, *row["top_logprobs"][1:]]}).capture
    assert found.top_logprobs[0, 0] == found.own_logprobs[0] == 0


def change(**changes):
    return lambda row: row | {key: value(row[key]) if callable(value) else value for key, value in changes.items()}


def at_one(value):
    """Changes the first entry of token 1."""
    return lambda lists: [lists[0], [value, *lists[1][1:]], *lists[2:]]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change(response=3), "row 0 (from 0): `response` must be a text, got 3"),
        (change(top_ids=None), "row 0 (from 0): `top_ids` must be a list with an entry per token, got None"),
        (change(token_ids=lambda x: x[1:]), "`top_ids` must have one entry for each of its"),
        (change(top_ids=[]), "`top_ids` must have one entry for each of its 7 tokens, got 0"),
        (change(logprobs=[]), "`logprobs` must have one entry for each of its 7 tokens, got 0"),
        (change(logprobs=5), "`logprobs` must have one entry for each of its 7 tokens, got 5"),
        (change(prompt_logprobs=[], prompt_token_ids=[5]), "`prompt_logprobs` must have one entry for each of its 1 tokens, got 0"),
        (change(top_logprobs=at_one(-(10**400))), "token 1 (from 0): a log-probability must be a number, 0 at most, got"),
        (change(top_ids=at_one("9" * 5000)), "token 1 (from 0): a token must be an id below"),
        (change(top_ids=at_one(10**9)), "token 1 (from 0): a token must be an id below"),
        (change(top_ids=at_one(True)), "token 1 (from 0): a token must be an id below"),
        (change(top_ids=at_one(1.5)), "token 1 (from 0): a token must be an id below"),
        (change(top_ids=lambda x: [x[0], [x[1][1]] * K, *x[2:]]), "token 1 (from 0): a token must come once, got"),
        (change(top_logprobs=at_one(0.7)), "token 1 (from 0): a log-probability must be a number, 0 at most, got 0.7"),
        (change(top_logprobs=at_one("x")), "token 1 (from 0): a log-probability must be a number, 0 at most, got"),
        (change(top_logprobs=at_one(float("nan"))), "token 1 (from 0): a log-probability must be a number, 0 at most, got"),
        (change(top_logprobs=at_one(-0.1)), "token 1 (from 0): probabilities must add up to 1 at most, got 1.355"),
        (change(top_logprobs=lambda x: [x[0], x[1][1:], *x[2:]]), "token 1 (from 0): `top_ids` and `top_logprobs` must be lists of one"),
        (change(logprobs=[-30.0] * 7), "token 0 (from 0): the log-probability of its own"),
        (change(top_ids=at_one(200), logprobs=[None, 0.0, *[None] * 5]), "must be at most that of the last among the most probable"),
        (lambda row: row | {"prompt_logprobs": [1], "prompt_token_ids": [5]}, "`prompt_logprobs` must map tokens to their `logprob`"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_its_token(tmp_path, chat, row, changed, message):
    check_refused(message, lambda: opened(tmp_path, chat, changed(row)))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change(response="Another."), "must have all responses that are learnt, or none of a split, it has not"),
        (change(token_ids=lambda x: [x[0], 7, *x[2:]]), "token 1 (from 0) of the response must be"),
        (lambda row: {key: value[:-1] if isinstance(value, list) else value for key, value in row.items()}, "got no more"),
        (change(top_ids=at_one(200)), "must have a finite log-probability, and it is not among the most probable; add it"),
        (change(top_ids=at_one(200), logprobs=[-math.inf] * 7), "must have a finite log-probability, and it is not among"),
        (change(top_ids=at_one(-1)), "token 1 (from 0) must have capture.top_k = 10 log-probabilities, it has 9"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_tokenizer_is_refused_with_row_and_token(tmp_path, chat, row, changed, message):
    check_refused(message, lambda: scored(tmp_path, chat, changed(row)))


def test_a_response_that_is_cut_takes_the_tokens_before_the_cut_or_the_line_says_so(tmp_path, chat, row):
    given = opened(tmp_path, chat, row)
    before = said(given, chat, Fitted("A wetab is", cut=True, verdict=Verdict.OK))
    assert before.capture.ids.tolist() == row["token_ids"][: before.tokens]
    with pytest.raises(
        DataError, match=r"of the response must be .* the response was cut there: raise data\.max_length"
    ):
        said(given, chat, Fitted("A wetab is a sto", cut=True, verdict=Verdict.OK))


def test_a_response_that_was_cut_is_found_by_its_whole_text(tmp_path, chat, row):
    given = opened(tmp_path, chat, row)
    capturing = SimpleNamespace(capture=SimpleNamespace(top_k=K))
    rows = {"train": [{"prompt": PROMPT}]}
    inputs: Any = SimpleNamespace(logprobs=lambda _: given, chats={"g": chat}, target=chat, rows=rows, recipe=capturing)
    cut = Fitted("A wetab is", cut=True, verdict=Verdict.OK)
    source = SourceConfig(name="g", model="demo:guardian")
    part = Part(0, [0], "")
    with Progress("take", 1, "examples", show=False) as bar:
        shard = taken(inputs, "train", part, source, [cut], lambda _: RESPONSE, bar)
    assert shard["ids"].tolist() == row["token_ids"][: len(shard["ids"])] != []


def test_of_rows_with_other_tokens_that_one_counts_which_fits(tmp_path, chat, row):
    other = row | {"token_ids": [5, *row["token_ids"][1:]], "logprobs": [-20.0, *[None] * (len(row["token_ids"]) - 1)]}
    given = GivenLogprobs("g", written(tmp_path / "a.jsonl", other, row), chat, K)
    assert said(given, chat).capture.ids.tolist() == row["token_ids"]


def test_of_two_rows_of_one_response_the_first_counts(tmp_path, chat, row):
    other = row | {"top_logprobs": [[x[0] - 1, *x[1:]] for x in row["top_logprobs"]]}
    found = GivenLogprobs("g", written(tmp_path / "a.jsonl", row, other), chat, K)
    assert said(found, chat).nll == scored(tmp_path, chat, row).nll


def test_a_file_about_other_prompts_is_refused_before_anything_runs(prepared, tmp_path, row):
    run = prepared[1]
    path = written(tmp_path / "top.jsonl", row)
    sources = [replace(run.recipe.sources[0], logprobs=path), *run.recipe.sources[1:]]
    alone = replace(run.recipe, sources=sources, judges=[], schedule="fusellm")
    with pytest.raises(DataError, match="must have responses of the data, it has none of them, for instance not"):
        Inputs.open(replace(run, recipe=alone))
    with pytest.raises(
        ConfigError, match=r"align\.follow_numbers must be false where a source's log-probabilities are given"
    ):
        replace(alone, align=replace(alone.align, follow_numbers=True))


def test_a_verdict_on_a_text_is_that_of_a_run(prepared, given):
    store, expected = given[1], prepared[2]
    for kind in (layout.truth("train", "scholar"), layout.winners("scholar")):
        ours, theirs = ([s.get(kind, n)["reason"].tolist() for n in s.numbers(kind)] for s in (store, expected))
        assert ours == theirs
        assert Verdict.OK in ours[0]
