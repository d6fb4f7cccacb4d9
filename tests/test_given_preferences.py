"""Preferences take the place of a judge: which of two responses to a prompt is the better one."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profuser.errors import DataError
from profuser.prepare.given_preferences import given_scores
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import prepare
from profuser.prepare.votes import count_votes
from profuser.recipe.schema import JudgeConfig
from profuser.store.export import audit_rows, export
from profuser.text.conversation import Conversation

USER = {"role": "user", "content": "a"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def written(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def spelt_in_csv(path: Path, *rows: dict[str, Any]) -> str:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return str(path)


def test_a_response_scores_the_share_of_its_comparisons_that_it_won(tmp_path):
    pairs = [("a", "x", "y"), ("a ", "x", " z\n"), ("a", "y", "x"), ("b", "y", "x")]
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in pairs]
    given = given_scores("j", written(tmp_path / "a.jsonl", *rows))
    found = [given.score({"prompt": prompt}, text) for prompt in "ab" for text in "xyzw"]
    np.testing.assert_array_equal(found, [2 / 3, 1 / 2, 0, 1 / 2, 0, 1, 1 / 2, 1 / 2])
    assert np.isnan(given.score({"prompt": "c"}, "x"))
    given = given_scores("j", spelt_in_csv(tmp_path / "a.csv", *rows))
    np.testing.assert_array_equal([given.score({"prompt": "a"}, text) for text in "xyz"], [2 / 3, 1 / 2, 0])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": [said("x")], "rejected": [said("y")]},
        {"prompt": [USER], "chosen": said("x"), "rejected": said("y")},
        {"prompt": "a", "chosen": [USER, said("x")], "rejected": [USER, said("y")]},
        {"chosen": [USER, said("x")], "rejected": [USER, said("y")]},
        {"messages": [USER], "prompt": None, "chosen": "x", "rejected": "y"},
        {"prompt": "", "chosen": [USER, said("x")], "rejected": "y"},
    ],
)
def test_preferences_may_be_written_as_trainers_have_them(tmp_path, row):
    spelt = {key: json.dumps(x) if isinstance(x, (list, dict)) else x for key, x in row.items()}
    for path in (written(tmp_path / "a.jsonl", row), spelt_in_csv(tmp_path / "a.csv", spelt)):
        given = given_scores("j", path)
        assert [given.score({"prompt": "a"}, text) for text in "xy"] == [1, 0]


def test_a_response_that_is_the_json_of_a_message_stays_a_text(tmp_path):
    chosen = json.dumps(said("x"))
    given = given_scores("j", written(tmp_path / "a.jsonl", {"prompt": "a", "chosen": chosen, "rejected": "y"}))
    assert given.score({"prompt": "a"}, chosen) == 1


def test_a_file_with_scores_is_one_of_scores_whatever_its_other_columns(tmp_path):
    row = {"prompt": "a", "response": "x", "score": 3, "chosen": True, "rejected": False}
    assert given_scores("j", written(tmp_path / "a.jsonl", row)).score({"prompt": "a"}, "x") == 3


def test_preferences_may_be_about_conversations(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, USER]
    path = written(tmp_path / "a.jsonl", {"chosen": [*talk, said("x")], "rejected": [*talk, said("y")]})
    given = given_scores("j", path)
    assert given.score({"prompt": Conversation.of(talk)}, "x") == 1
    assert np.isnan(given.score({"prompt": "a"}, "x"))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "x"}, "`rejected` must be a text, or messages that end with the assistant's"),
        ({"prompt": "a", "chosen": "x", "rejected": "x "}, "must differ, got 'x' twice"),
        ({"chosen": "x", "rejected": "y"}, "must have a text as `prompt`, or `messages`"),
        ({"prompt": "a", "chosen": [said("x"), USER], "rejected": "y"}, "`chosen` must end with the assistant's"),
        ({"prompt": "a", "response": "x", "score": 1}, "`chosen` must be a text, or messages"),
        (
            {"prompt": "b", "chosen": [USER, said("x")], "rejected": "y"},
            "the prompt must be the same wherever the row has it",
        ),
        (
            {"chosen": [USER, said("x")], "rejected": [said("h"), USER, said("y")]},
            "the user first",
        ),
        (
            {"chosen": [USER, said("x")], "rejected": [{"role": "user", "content": "b"}, said("y")]},
            "must be the same wherever the row has it, got 'a' and 'b'",
        ),
    ],
)
def test_a_wrong_preference_is_named(tmp_path, row, expected):
    path = written(tmp_path / "a.jsonl", {"prompt": "a", "chosen": "x", "rejected": "y"}, row)
    with pytest.raises(DataError, match=r"a\.jsonl, row 1 \(from 0\)") as error:
        given_scores("j", path)
    assert expected in str(error.value)


def test_exported_preferences_elect_the_same_winners(prepared, tmp_path):
    _, run, expected = prepared
    counts = export(expected, tmp_path / "out")
    judge = JudgeConfig(name="people", scores=str(tmp_path / "out/preferences.parquet"))
    recipe = replace(run.recipe, judges=[judge], store=str(tmp_path / "store"))
    found = count_votes(prepare(replace(run, recipe=recipe)), recipe).winner
    compared = [row["rejected"] is not None for row in audit_rows(expected)]
    assert sum(compared) == counts["preferences"] > 2
    np.testing.assert_array_equal(found[compared], count_votes(expected, run.recipe).winner[compared])


def test_preferences_between_other_responses_are_missed_before_anything_is_made(prepared, tmp_path):
    _, run, _ = prepared
    rows = Inputs.open(run).rows["train"]
    answers = written(tmp_path / "r.jsonl", *({"prompt": str(row["prompt"]), "response": "Answer: 1."} for row in rows))
    path = written(tmp_path / "p.jsonl", {"prompt": str(rows[0]["prompt"]), "chosen": "x", "rejected": "y"})
    recipe = replace(
        run.recipe,
        sources=[replace(source, responses=answers) for source in run.recipe.sources],
        judges=[JudgeConfig(name="people", scores=path)],
    )
    with pytest.raises(DataError, match="must have preferences between the sources' responses, it has none"):
        Inputs.open(replace(run, recipe=recipe))
