"""Responses and scores that a user has already take the place of sources and judges: nobody is asked, and the store is the same."""

import contextlib
import csv
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as pq
import pytest
from conftest import small_run

from profuser.errors import ConfigError, DataError
from profuser.plan.asked import Asked, asked_of_each
from profuser.prepare.data import plain
from profuser.prepare.given import GivenResponses, GivenScores, file_digest
from profuser.prepare.given_logprobs import GivenLogprobs
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import Preparation, prepare
from profuser.prepare.votes import candidates_of, count_votes
from profuser.recipe.schema import JudgeConfig
from profuser.store import layout
from profuser.store.export import export
from profuser.store.files import sha256
from profuser.text.conversation import Conversation
from profuser.text.fit import Verdict


def written(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def given_files(prepared, folder: Path):
    """Writes what the small store holds as a user would have it: a table of responses for each source, one of scores for each judge."""
    _, run, expected = prepared
    inputs = Inputs.open(run)
    rows, names = inputs.rows["train"], inputs.source_names
    ballots = count_votes(expected, run.recipe)

    held = {row["prompt"]: row for row in inputs.rows["heldout"]}
    sources, judges = [], []
    for source in run.recipe.sources:
        answers = {
            split: expected.by_example(kind := layout.responses(split, source.name), partial(expected.get_json, kind))
            for split in ("train", "heldout")
        }
        table = [
            {"prompt": f" {row['prompt']}\n", "response": text, "finished": finished}
            for split, examples in (("train", rows), ("heldout", inputs.rows["heldout"]))
            for row, ((text, finished, _),) in zip(examples, answers[split], strict=True)
            if split == "train" or row["prompt"] in held
        ]
        sources.append(replace(source, responses=written(folder / f"{source.name}.jsonl", *table)))
    for r, judge in enumerate(run.recipe.judges):
        table = [
            {
                "prompt": row["prompt"],
                "response": ballots.candidates[e][c].text,
                "score": float(ballots.scores[e, r, c]),
            }
            for e, row in enumerate(rows)
            for c in range(len(names))
            if ballots.eligible[e, c]
        ]
        given = written(folder / f"{judge.name}.jsonl", *table)
        judges.append(JudgeConfig(name=judge.name, scores=given, floor=judge.floor))
    return sources, judges


def test_nobody_is_asked_and_the_targets_are_the_same(prepared, tmp_path, monkeypatch, capsys):
    _, run, expected = prepared
    sources, judges = given_files(prepared, tmp_path)
    names = [source.name for source in sources]

    def asked(*args, **kwargs):
        raise AssertionError("a source was asked")

    monkeypatch.setattr("profuser.prepare.engines.generate", asked)
    monkeypatch.setattr("profuser.prepare.judges._reward_model_judge", asked)
    monkeypatch.setattr("profuser.prepare.judges._function_judge", asked)
    recipe = replace(run.recipe, sources=sources, judges=judges, store=str(tmp_path / "store"))
    store = prepare(replace(run, recipe=recipe))
    for kind in (layout.targets("train"), layout.targets("heldout"), *map(layout.winners, names)):
        assert store.digest(kind) == expected.digest(kind), kind
    assert [candidates_of(store, names, n) for n in store.numbers(layout.responses("train", names[0]))] == [
        candidates_of(expected, names, n) for n in expected.numbers(layout.responses("train", names[0]))
    ]
    assert "12 train prompts have their responses from" in capsys.readouterr().out
    planned = asked_of_each(recipe, Inputs.open(replace(run, recipe=recipe)))
    assert [planned[name] for name in names] == [
        Asked(1.0, scores=True, answers=False, answers_heldout=False, is_run=True)
    ] * 3

    # A file that says the same in another order changes nothing, but the training does not take it unasked.
    path, before = Path(str(sources[0].responses)), store.digests
    table = [json.loads(line) for line in path.read_text().splitlines()][::-1]
    written(path, *table)
    with contextlib.ExitStack() as held, pytest.raises(ConfigError, match=rf"sources\.{names[0]}\.responses differ"):
        Preparation.begin(Inputs.open(replace(run, recipe=recipe)), held)
    assert prepare(replace(run, recipe=recipe)).digests == before
    # Of one that says something else, the shard is made again, and what follows from it.
    next(row for row in reversed(table) if row["finished"])["finished"] = False
    written(path, *table)
    store = prepare(replace(run, recipe=recipe))
    changed = {name for name, digest in store.digests.items() if digest != before[name]}
    (number,) = {name.rpartition("-")[2] for name in changed}
    assert layout.responses("train", names[0]).shard(int(number)) in changed
    assert all(layout.kind_of(name)[0].folder != "truth" for name in changed)

    # A response without a score is missed before anything is made.
    path.write_text(path.read_text().replace("Answer", "answer"))
    with pytest.raises(
        DataError, match=f"judges: {judges[0].name}: scores .* must have a score for every finished response"
    ):
        Inputs.open(replace(run, recipe=recipe))
    export(store, tmp_path / "out")
    assert f"`{tmp_path / judges[0].name}.jsonl`" in (tmp_path / "out" / "README.md").read_text()


ROWS = [{"prompt": "a  b"}, {"prompt": "c"}]


def test_responses_are_found_by_their_prompts(tmp_path):
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    path = written(
        tmp_path / "a.jsonl",
        {"prompt": "c", "response": " two \n", "finished": False},
        {"prompt": "a b", "response": "one", "left_out": None},
        {"messages": talk, "response": "three", "left_out": "response with control tokens, skipped"},
    )
    given = GivenResponses("s", path)
    rows = [*ROWS, {"prompt": Conversation.of(talk)}]
    assert given.check("train", rows, 1)
    found = [response for (response,) in given.of(rows, 1)]
    assert [(r.text, r.finished) for r in found] == [("one", True), ("two", False), ("three", True)]
    assert [r.verdict for r in found] == [Verdict.OK, Verdict.OK, Verdict.CONTROL]
    assert [r.eligible for r in found] == [True, False, False]
    assert not given.check("heldout", [{"prompt": "other"}], 1)
    with pytest.raises(DataError, match=r"1 response to each heldout prompt, it has 0 to example 1 \(from 0\)"):
        given.check("heldout", [ROWS[0], {"prompt": "other"}], 1)
    with pytest.raises(DataError, match="1 response to each train prompt, it has 0 to example 0"):
        given.check("train", [{"prompt": "other"}], 1)
    with pytest.raises(DataError, match="2 responses to each train prompt, it has 1"):
        given.check("train", ROWS, 2)


def test_reasoning_is_taken_out_of_responses_where_the_recipe_says_so(prepared, tmp_path):
    """As of a source that answers itself. What cannot be told from its reasoning is left out, and nothing else is changed."""
    said = {
        "<think>\nWhich? This.\n</think>\n\nAnswer: 11.": ("Answer: 11.", Verdict.OK),
        "Answer: 12.": ("Answer: 12.", Verdict.OK),
        "<think>\nWhich? I": ("", Verdict.REASONING),
        "<think>a</think> b </think> c": ("", Verdict.REASONING),
        "": ("", Verdict.OK),
        "Is </s> an end?": ("Is </s> an end?", Verdict.OK),
    }
    _, run, _ = prepared
    asked = Inputs.open(run).rows["train"][: len(said)]
    rows = [{"prompt": plain(row["prompt"]), "response": text} for row, text in zip(asked, said)]
    rows += [{"prompt": plain(row["prompt"]), "response": "x"} for row in Inputs.open(run).rows["train"][len(said) :]]
    first, *others = run.recipe.sources
    for reasoning in ("strip", "keep"):
        source = replace(first, responses=str(written(tmp_path / "a.jsonl", *rows)), reasoning=reasoning)
        inputs = Inputs.open(replace(run, recipe=replace(run.recipe, sources=[source, *others])))
        given = inputs.given(source, "train")
        assert given is not None
        found = [(response.text, response.verdict) for (response,) in given.of(asked, 1)]
        assert found == [*said.values()] if reasoning == "strip" else [(text, Verdict.OK) for text in said]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a"}, "`response` must be a text"),
        ({"prompt": "a", "response": 7}, "`response` must be a text"),
        ({"response": "a"}, "must have a text as `prompt`, or `messages`"),
        ({"messages": [{"role": "assistant", "content": "a"}], "response": "a"}, "the user first"),
        ({"prompt": "a", "response": "b", "finished": "yes"}, "`finished` must be true or false"),
        (
            {"prompt": "a", "response": "b", "left_out": "bad"},
            "`left_out` must be empty, or one of 'empty response, skipped', ",
        ),
    ],
)
def test_a_wrong_row_of_responses_is_named(tmp_path, row, expected):
    path = written(tmp_path / "a.jsonl", {"prompt": "b", "response": "c"}, row)
    with pytest.raises(DataError, match=r"a\.jsonl, row 1 \(from 0\)") as error:
        GivenResponses("s", path)
    assert expected in str(error.value)


def test_scores_are_found_by_prompt_and_response(tmp_path):
    rows = [("a b", "x", 1), ("a b", "y", None), ("c", "x", "2.5"), ("c", " x\n", 2.5)]
    path = written(tmp_path / "a.jsonl", *({"prompt": p, "response": r, "score": s} for p, r, s in rows))
    given = GivenScores("j", path)
    assert given.score(ROWS[0], "x") == 1
    assert given.score(ROWS[0], "y") != given.score(ROWS[0], "y")
    assert given.score(ROWS[1], "x") == 2.5
    with pytest.raises(DataError, match="it has none for 'y' to 'c'"):
        given.score(ROWS[1], "y")
    for bad, expected in (
        ({"score": True}, "must be a number"),
        ({"scores": 2}, "must be a number or null, got None"),  # a name that is not read would be an abstention
        ({"score": "high"}, "must be a number"),
        ({"score": 10**400}, "must be a number or null, got 1000"),
        (
            {"score": -1e39},
            "must be 3.4e+38 at most, got -1e+39",
        ),  # which would be infinite, and tie with others that are
        ({"score": 3}, "one score"),
    ):
        path = written(
            tmp_path / "b.jsonl", {"prompt": "a", "response": "x", "score": 1}, {"prompt": "a", "response": "x"} | bad
        )
        with pytest.raises(DataError, match="row 1") as error:
            GivenScores("j", path)
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("none.jsonl", None, "must be an existing file or a pattern of files, got "),
        ("*.jsonl", None, "must be an existing file or a pattern of files, got "),
        ("folder", "", "must be a file or a pattern of files, got "),
        ("rows.txt", "{}", "must be .jsonl, "),
        ("rows.jsonl", "{", "rows.jsonl cannot be read (line 1: "),
        ("rows.jsonl", '{"prompt": "\\ud800"}', "rows.jsonl must hold Unicode, row 0"),
    ],
)
def test_a_file_that_cannot_be_read_is_called_what_it_is(tmp_path, name, content, expected):
    """It is not the data, for which a recipe has another key."""
    if name == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    chat: Any = None
    openings: dict[str, Callable[[str], Any]] = {
        "sources: s: responses": lambda path: GivenResponses("s", path),
        "judges: s: scores": lambda path: GivenScores("s", path),
        "sources: s: logprobs": lambda path: GivenLogprobs("s", path, chat, 1),
    }
    for key, opened in openings.items():
        with pytest.raises(DataError) as error:
            opened(str(tmp_path / name))
        assert str(error.value).startswith(f"{key} ")
        assert expected in str(error.value)
        assert "\n" not in str(error.value)


def test_a_judge_is_one_of_three(tmp_path):
    for wrong in ("scores: s.jsonl, model: m", "floor: 1"):
        with pytest.raises(ConfigError, match="one of model, function, grader, server and scores"):
            small_run(tmp_path, "--judges", f"[{{name: j, {wrong}}}]")


def test_prompts_are_compared_without_whitespace():
    assert plain(" a\n b ") == plain("a b") == "a b"


def test_files_of_every_kind_are_read_alike(tmp_path):
    """A CSV file has nothing but texts, and a conversation in it is the JSON text of its messages."""
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    rows = [
        {"prompt": "a", "messages": None, "response": "one", "finished": None, "score": None},
        {"prompt": "b", "messages": None, "response": "two", "finished": False, "score": 1.5},
        {"prompt": None, "messages": talk, "response": "three, \n3", "finished": True, "score": -2.0},
    ]
    examples = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": Conversation.of(talk)}]
    with open(tmp_path / "a.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(row | {"messages": row["messages"] and json.dumps(row["messages"])} for row in rows)
    pq.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[m["role"]], "value": m["content"], "id": 1} for m in talk
    ]
    written(tmp_path / "a.jsonl", *rows[:2], rows[2] | {"messages": sharegpt})
    for name in ("a.csv", "a.parquet", "a.jsonl"):
        given = GivenResponses("s", str(tmp_path / name))
        assert given.check("train", examples, 1)
        found = [(r.text, r.finished) for (r,) in given.of(examples, 1)]
        assert found == [("one", True), ("two", False), ("three, \n3", True)]
        scores = GivenScores("j", str(tmp_path / name))
        assert str([scores.score(*pair) for pair in zip(examples, ("one", "two", "three, \n3"))]) == "[nan, 1.5, -2.0]"


def test_a_file_may_have_as_many_rows_as_the_data(tmp_path):
    """Where a prompt stands in the data twice, the response to it stands in the file once or twice, and is the same."""
    row = {"prompt": "a", "response": "one"}
    twice = [{"prompt": "a"}, {"prompt": "a\n"}]
    given = GivenResponses("s", written(tmp_path / "a.jsonl", row, row | {"response": "one\n"}))
    assert given.check("train", twice, 1)
    assert given.check("heldout", twice[:1], 1)
    assert [[r.text for r in answers] for answers in given.of(twice, 1)] == [["one"]] * 2
    # Of several responses to a prompt, two may be equal.
    assert given.check("train", twice, 2)
    assert [[r.text for r in answers] for answers in given.of(twice, 2)] == [["one", "one"]] * 2
    for other in ({"response": "two"}, {"finished": False}):
        given = GivenResponses("s", written(tmp_path / "b.jsonl", row, row | other))
        with pytest.raises(DataError, match="1 response to each train prompt, it has 2 to example 0"):
            given.check("train", twice, 1)


def test_a_prompt_is_named_as_the_data_name_it(tmp_path):
    path = written(
        tmp_path / "a.jsonl",
        {"prompt": [{"role": "user", "content": "a"}], "response": "one"},
        {"prompt": 7, "response": "two"},
        {"prompt": "", "response": "three"},
    )
    given = GivenResponses("s", path)
    assert [r.text for (r,) in given.of([{"prompt": "a"}, {"prompt": "7"}, {"prompt": ""}], 1)] == [
        "one",
        "two",
        "three",
    ]


def test_the_digest_of_a_pattern_is_that_of_all_its_files(tmp_path):
    one = written(tmp_path / "1.jsonl", {"prompt": "a", "response": "x"})
    digest = partial(file_digest, "sources: s: responses")
    assert digest(str(tmp_path / "*.jsonl")) == digest(one) == sha256(Path(one).read_bytes())[:16]
    written(tmp_path / "2.jsonl", {"prompt": "b", "response": "y"})
    both = digest(str(tmp_path / "*.jsonl"))
    assert GivenResponses("s", str(tmp_path / "*.jsonl")).check("train", [{"prompt": "a"}, {"prompt": "b"}], 1)
    written(tmp_path / "2.jsonl", {"prompt": "b", "response": "z"})
    assert len({both, digest(one), digest(str(tmp_path / "*.jsonl"))}) == 3
    for wrong in ("none.jsonl", "*.csv", ""):
        with pytest.raises(DataError, match=r"^sources: s: responses must be [^\n]*(no such file|which is none)"):
            digest(str(tmp_path / wrong))
