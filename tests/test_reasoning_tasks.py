"""The reasoning-gym data of smollm2.yaml: what counts as an answer, and that no prompt of the files is repeated."""

import json

import pytest

from profuser.errors import ConfigError
from profuser.experiments import reasoning_tasks
from profuser.experiments.reasoning_tasks import SPLITS, TASKS, answer_of, correct, form, main, verifier


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("Answer: -12.", "-12"),
        ("The final answer to this arithmetic problem is 10.", "10"),
        ("7 * 9 = 63", "63"),
        ("The day of the week for 03/13/2022 is Wednesday.", "Wednesday"),
        ('The letter "o" appears 1 time in the text', "1"),
        ("The answer is **5**.", "5"),
        ("Monday", "Monday"),
        ("Hisses 3 of 4", "4"),
        ("", ""),
    ],
)
def test_the_answer_is_found_in_responses_of_many_forms(response, answer):
    assert answer_of(response) == answer


def test_the_form_judge_wants_a_number_where_the_truth_is_one():
    assert form({"response": "Answer: 7."}, ["It is 9.", "A stone."]) == [1, 0]
    assert form({"response": "Answer: Friday."}, ["It is 9.", "It is Monday."]) == [0, 1]


def test_the_files_hold_every_task_in_turn_and_no_prompt_twice(tmp_path, capsys):
    pytest.importorskip("reasoning_gym", reason="pip install reasoning-gym==0.1.25")
    main(["--out", str(tmp_path), "--scale", "0.1"])
    files = {s: [json.loads(line) for line in (tmp_path / f"{s}.jsonl").read_text().splitlines()] for s in SPLITS}
    assert {s: len(rows) for s, rows in files.items()} == {s: len(TASKS) * round(0.1 * n) for s, n in SPLITS.items()}
    prompts = [row["prompt"] for rows in files.values() for row in rows]
    assert len(set(prompts)) == len(prompts)
    assert [row["skill"] for row in files["train"][: len(TASKS)]] == list(TASKS)
    for row in files["heldout"]:
        assert correct(row, row["response"])
        assert verifier(row, [row["response"], "It is no answer at all."])[0] == 1
        assert not correct(row, "It is no answer at all.")


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    reasoning_tasks.gym.cache_clear()
    with pytest.raises(ConfigError, match="pip install reasoning-gym"):
        main(["--out", str(tmp_path)])
    reasoning_tasks.gym.cache_clear()
