"""Graders compare the answer of a response with the right one, and a model on a server gives a score by a rubric."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from chat_server import chat_server, choice
from command_runs import run as run_command
from conftest import small_run

from profuser.errors import ConfigError, DataError, ProfuserError
from profuser.prepare import server
from profuser.prepare.graders import GRADERS, answer_in, grader, number_in
from profuser.prepare.inputs import Inputs
from profuser.prepare.judges import judge_fingerprint, load_judge, open_judge
from profuser.prepare.phases import prepare
from profuser.prepare.rubric import score_in
from profuser.recipe.rubric import RubricConfig
from profuser.recipe.schema import JudgeConfig
from profuser.recipe.server import ServerConfig
from profuser.store import layout
from profuser.store.unfinished import Unfinished
from profuser.text.conversation import Conversation


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("8-4=4. 4+5=9. Answer: 11.", "11."),
        ("First, Answer: 3.\nNo.\n**Answer:** 4\nGlad to help!", "4"),
        ("**Answer**: 4 of 12", "4 of 12"),
        ("The **answer** is 4", "4"),
        ("So the answer is 12 apples", "12 apples"),
        ("The answer is: bitter", "bitter"),
        ("I cannot answer that.", "I cannot answer that."),
        ("48 / 2 = <<48/2=24>>24.\n#### 72", "72"),
        ("#### 3\nNo, once more:\n#### 4\nDone.", "4"),
        ("so \\boxed{3} or rather \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{never closed", "never closed"),
        ("Answer:", "Answer:"),
        (" just so ", "just so"),
        ("", ""),
    ],
)
def test_the_answer_in_a_text(text, answer):
    assert answer_in(text) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("11.", 11),
        ("1,200", 1200),
        ("$1,234,567.50 in all", Fraction("1234567.5")),
        ("-$3.10", Fraction("-3.1")),
        ("x = -4", -4),
        ("\u22124", -4),
        ("5 - 3", 3),
        ("5-3", 3),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        ("3 / 4", Fraction(3, 4)),
        ("2400/2", 1200),
        ("1e3", 1000),
        ("1.5E-2", Fraction(3, 200)),
        ("5km", 5),
        ("x2", None),
        ("between 3 and 4", 4),
        ("1, 2", 2),
        ("12,3456", 3456),
        ("1/0", None),
        ("none", None),
        ("", None),
        ("9" * 40, int("9" * 40)),
        pytest.param("1/1" + "0" * 5000, Fraction(1, 10**5000), id="long"),
    ],
)
def test_the_last_number_in_a_text(text, value):
    assert number_in(text) == value


@pytest.mark.parametrize(
    ("kind", "example", "responses", "expected"),
    [
        ("exact", {"response": "A bozun is a stone. Answer: bitter."},
         ["Answer: Bitter", "bitter", "sweet", "Answer: not bitter"], [1, 1, 0, 0]),
        ("exact", {"response": "long words", "answer": "B"}, ["The answer is **B**.", "\u201cb\u201d.", "A or B"], [1, 1, 0]),
        ("exact", {"response": "x", "answer": 7}, ["7", "7.0"], [1, 0]),
        ("exact", {"response": ""}, ["anything"], [math.nan]),
        ("exact", {"response": "Answer: 7", "answer": " "}, ["7", "8"], [1, 0]),
        ("number", {"response": "4+5=9. Answer: 9."}, ["Answer: 9", "It is 9.0 in all", "4+5=10", "nine"], [1, 1, 0, 0]),
        ("number", {"response": "#### 1,200"}, ["so we have 1200", "\\boxed{2400/2}", "12"], [1, 1, 0]),
        ("number", {"response": "blue"}, ["9"], [math.nan]),
        ("reasoning_gym", {"prompt": "q", "response": "-4", "answer": "-4", "metadata": {"source_dataset": "basic_arithmetic"}},
         ["Answer: -4", "The answer is 4"], [1, 0]),
        ("reasoning_gym", {"prompt": "q", "response": "-4", "metadata": '{"source_dataset": "basic_arithmetic"}'}, ["-4"], [1]),
        ("reasoning_gym", {"prompt": "q", "response": "-4", "skill": "basic_arithmetic",
                           "entry": '{"question": "q", "answer": "-4", "metadata": {}}'}, ["-4"], [1]),
        ("reasoning_gym", {"prompt": "q", "response": "2 \u00d7 3", "metadata": {"source_dataset": "prime_factorization", "number": 6}},
         ["2 \u00d7 3", "two and three"], [1, 0]),
    ],
)  # fmt: skip
def test_what_a_grader_says(kind, example, responses, expected):
    np.testing.assert_array_equal(grader(kind)(example, responses), expected)


@pytest.mark.parametrize(
    ("right", "response", "expected"),
    [
        ("1/2", "so it is \\boxed{\\frac{2}{4}}", 1),
        ("\\{1, 2\\}", "The answer is $\\{2, 1\\}$", 1),
        ("x + 1", "$1 + x$", 1),
        ("11", "9+2=11. Answer: 11.", 1),
        ("11", "9+3=12. Answer: 12.", 0),
        ("$\\sqrt{8}$", "\\boxed{2\\sqrt{2}}", 1),
        ("3", "I do not know", 0),
        ("x+1", "The answer is x + 1.", 1),
        ("x+1", "The answer is x + 2.", 0),
        ("3 apples", "3 Apples.", 1),
        ("5", "Answer: .5", 0),
        (".5", "Answer: 5", 0),
        (".5", "\\boxed{.5}", 1),
        ("x-y", "Answer: $x-y$", 1),
        ("(x,y)", "Answer: $(x,y)$", 1),
        ("n!", "Answer: $n!$", 1),
        ("\\text{Evelyn}", "\\boxed{\\text{Evelyn}}", 1),
    ],
)
def test_maths_are_equal_whatever_they_look_like(right, response, expected):
    pytest.importorskip("math_verify")
    assert grader("maths")({"response": "", "answer": right}, [response]) == [expected]


@pytest.mark.parametrize("right", ["B", "B.", "yes", "yellow", "(C)", "well-known", "Paris, France", "it's a cat"])
def test_maths_abstain_where_the_right_answer_is_a_word(right):
    """math-verify would read a word as a product of letters in the right answer, and as nothing in a response."""
    pytest.importorskip("math_verify")
    assert np.isnan(grader("maths")({"response": right}, [right, f"\\boxed{{{right}}}"])).all()


def test_a_package_that_is_missing_is_named(monkeypatch):
    for kind, package in (("maths", "math_verify"), ("reasoning_gym", "reasoning_gym")):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(ConfigError, match=r"needs the package .*; run `pip install"):
            open_judge(JudgeConfig(name="g", grader=kind))


@pytest.mark.parametrize(
    "example", [{"metadata": None}, {"metadata": "no JSON"}, {"metadata": {"source_dataset": "no_such_task"}}, {}]
)
def test_an_example_that_is_none_of_reasoning_gyms_is_refused(example):
    judge = load_judge(JudgeConfig(name="g", grader="reasoning_gym"))
    with pytest.raises(
        DataError, match=r"judge g: the grader reasoning_gym must return .* an example of reasoning-gym must have"
    ) as error:
        judge([{"prompt": "q", "response": "1"} | example], [["1"]])
    assert "\n" not in str(error.value)


def test_what_is_wrong_with_the_entry_itself_is_an_error():
    example = {"prompt": "q", "response": "1", "metadata": {"source_dataset": "sudoku"}}
    with pytest.raises(KeyError, match="solution"):
        grader("reasoning_gym")(example, ["2"])


def test_every_grader_has_a_fingerprint_of_its_own():
    assert len({judge_fingerprint(JudgeConfig(name="g", grader=kind)) for kind in GRADERS}) == len(GRADERS)


CODE = """\
# A judge.
def score(example, responses):

    return [len(r) for r in responses]  # the longer the better

TEXT = f'''{1}  # no comment

'''
"""


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (("# A judge.\n", ""), True),
        (("# the longer the better", "# fixed"), True),
        (("  # the longer the better", ""), True),
        (("responses):\n\n", "responses):   \n    # first\n\n\n"), True),
        (("'''\n", "'''"), True),
        (("len(r) for", "-len(r) for"), False),
        (("# no comment", "# a text"), False),
        (("comment\n\n", "comment\n"), False),
        (("    return", "        return"), False),
    ],
)
def test_comments_and_blank_lines_are_no_part_of_a_judges_fingerprint(change, same, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number, code in enumerate((CODE, CODE.replace(*change))):
        assert number == 0 or code != CODE
        (tmp_path / f"judge_{number}.py").write_text(code)
        found.append(judge_fingerprint(JudgeConfig(name="j", function=f"judge_{number}:score")))
        del sys.modules[f"judge_{number}"]
    assert (found[0] == found[1]) == same


TWO = (
    "--sources=[{name: a, model: 'demo:guardian'}, {name: b, model: 'demo:scholar'}]",
    "--target=a",
    "--generation.max_new_tokens=12",
)


def test_a_grader_votes_as_any_judge_does(tmp_path):
    run = small_run(tmp_path, *TWO, "--judges=[{name: right, grader: exact}, {name: sums, grader: number}]",
                    "--judging.no_signal=ground_truth", "--generation.max_new_tokens=48")  # fmt: skip
    store = prepare(run)
    rows = Inputs.open(run).rows["train"]
    scores = np.concatenate(
        [store.get(layout.scores("right"), n)["scores"] for n in store.numbers(layout.scores("right"))]
    )
    assert scores.shape == (len(rows), 2)
    assert set(np.unique(scores[~np.isnan(scores)])) == {0.0, 1.0}
    assert store.settings.votes["judges"]["right"]["grader"] == "exact"


# --- a model on a server ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.001)


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("It is right.\nScore: 7", 7),
        ("**Final score:** 8/10", 8),
        ("My overall score is 6.5.", 6.5),
        ("Score: 3\nOn reflection:\nScore: 4\n", 4),
        ("A score of 10 needs more.\nScore: 2", 2),
        ("Rating: [[9]]", 9),
        ("Score: 4\nNot [[9]].", 4),
        ('{"reason": "good", "score": 5}', 5),
        ('```json\n{"score": 5}\n```', 5),
        (" 8 ", 8),
        ("8/10", 8),
        ("**4**", 4),
        ("-2", -2),
        ("It is good, I would say 8", None),
        ("Score: high", None),
        ("A score of 9 would be too much.", None),
        ('{"score": "9"}', 9),
        ('{"score": true}', None),
        ("[1, 2]", None),
        pytest.param('{"why": "good", "score": 1' + "0" * 400 + "}", None, id="too large"),
        pytest.param("[" * 100_000, None, id="nested"),
        pytest.param(
            "the\n" * 100_000 + "Score: 5", 5, id="long"
        ),  # a search that starts again at every line would take minutes
        ("", None),
    ],
)
def test_the_score_in_a_reply(reply, score):
    assert score_in(reply) == score


def of_server(url: str, **rubric) -> JudgeConfig:
    return JudgeConfig(
        name="critic",
        server=ServerConfig(url=url, retries=0, model="served"),
        rubric=RubricConfig(**rubric) if rubric else None,
    )


EXAMPLES = [
    {"prompt": "One?", "response": "1 {response}"},
    {
        "prompt": Conversation.of([{"role": "system", "content": "Count."}, {"role": "user", "content": "Two?"}]),
        "response": "2",
    },
]


def test_a_judge_on_a_server_reads_the_rubric_with_each_response_once(tmp_path):
    rubric = tmp_path / "rubric.md"
    rubric.write_text("{prompt} | {ground_truth} | {response} | {lowest} to {highest} {braces}")
    with chat_server(lambda body: choice(f"Score: {len(body['messages'][0]['content']) % 10}")) as there:
        judge = load_judge(of_server(there.url, text=str(rubric), lowest=0, highest=9))
        done = []
        scores = judge(
            EXAMPLES,
            [["a {prompt}", "", "a {prompt}"], ["b", "{ground_truth}", ""]],
            lambda n=1, *, tokens=0: done.append(n),
        )
    asked = {body["messages"][0]["content"] for body in there.bodies}
    assert asked == {
        "One? | 1 {response} | a {prompt} | 0 to 9 {braces}",
        "system: Count.\nuser: Two? | 2 | b | 0 to 9 {braces}",
        "system: Count.\nuser: Two? | 2 | {ground_truth} | 0 to 9 {braces}",
    }
    assert len(there.bodies) == 3
    assert {body["temperature"] for body in there.bodies} == {0.0}
    assert scores[0, 0] == scores[0, 2] == len("One? | 1 {response} | a {prompt} | 0 to 9 {braces}") % 10
    assert np.isnan(scores).tolist() == [[False, True, False], [False, False, True]]
    assert sum(done) == 2


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (choice("I like it"), r"of the response 'good' to 'One\?' it has none \('I like it'\)"),
        (choice("Score: 11"), "it has 11"),
        (choice("Score: 0"), "it has 0"),
        (choice("I think that", "length"), "which was cut: raise rubric.max_new_tokens"),
    ],
)
def test_a_reply_without_a_score_is_an_error_or_an_abstention(reply, says):
    with chat_server(lambda body: reply) as there:
        with pytest.raises(DataError, match=says) as error:
            load_judge(of_server(there.url))(EXAMPLES[:1], [["good"]])
        assert "\n" not in str(error.value)
        assert "rubric.no_score: abstain" in str(error.value)
        assert np.isnan(load_judge(of_server(there.url, no_score="abstain"))(EXAMPLES[:1], [["good"]])).all()


def test_scores_are_kept_one_by_one(tmp_path):
    kind, said = layout.scores("critic"), {"a": 3, "b": 4, "c": 5}
    candidates = [["a", "b"], ["c", "a"]]

    def answer(body):
        (text,) = [t for t in said if f"that you judge]\n{t}\n" in body["messages"][0]["content"]]
        if len(there.bodies) == stop[0]:
            return 500, "gone"
        return choice("no score here" if text == "b" else f"Score: {said[text]}")

    with chat_server(answer) as there:
        config = of_server(there.url, no_score="abstain")
        config.server.concurrency = 1  # pyrefly: ignore[missing-attribute]
        judge, stop = load_judge(config), [3]
        with pytest.raises(ProfuserError, match="gone"), Unfinished(tmp_path, kind, 0, "x") as kept:
            judge(EXAMPLES, candidates, kept=kept)
        stop[0] = 0
        with Unfinished(tmp_path, kind, 0, "x") as kept:
            scores = judge(EXAMPLES, candidates, kept=kept)
        assert len(there.bodies) == 3 + 2
    np.testing.assert_array_equal(scores, np.array([[3, np.nan], [5, 3]], np.float32))


def test_a_judge_on_a_server_votes_and_another_rubric_votes_again(tmp_path, capsys):
    with chat_server(lambda body: choice(f"Score: {1 + len(body['messages'][0]['content']) % 9}")) as there:
        run = small_run(
            tmp_path, *TWO, f"--judges=[{{name: critic, server: '{there.url}'}}]", "--judging.no_signal=ground_truth"
        )
        store = prepare(run)
        asked, digest = len(there.bodies), store.digest(layout.scores("critic"))
        assert prepare(run).digest(layout.scores("critic")) == digest
        assert len(there.bodies) == asked
        assert not (store.directory / "unfinished").exists()
        (judge,) = run.recipe.judges
        other = replace(judge, rubric=RubricConfig(text="{prompt} {response} Score?"))
        prepare(replace(run, recipe=replace(run.recipe, judges=[other])))
        assert len(there.bodies) > asked
        assert "critic" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("judge", "code", "says"),
    [
        ("{ name: a, grader: exactly }", 2, "exact"),
        ("{ name: a, grader: exact, function: m:f }", 2, "must have one of model, function, grader, server and scores"),
        ("{ name: a, grader: exact, rubric: { lowest: 0 } }", 2, "rubric is for a judge on a server"),
        ("{ name: a, server: 'http://127.0.0.1:9/v1', rubric: { lowest: 5, highest: 5 } }", 2, "rubric.lowest must be below"),
        ("{ name: a, server: 'http://127.0.0.1:9/v1', rubric: { text: none.txt } }", 3, "got none.txt; fix the path"),
        ("{ name: a, server: 'http://127.0.0.1:9/v1', rubric: { text: 'rate {response}' } }", 3, "it lacks {prompt}"),
        ("{ name: a, server: { url: 'http://127.0.0.1:9/v1', retries: 0 } }", 1, "a: server: the server http://127.0.0.1:9/v1 must reply"),
    ],
)  # fmt: skip
def test_a_judge_that_cannot_be_is_one_line(in_run, judge, code, says):
    recipe = Path("recipe.yaml")
    recipe.write_text(recipe.read_text().replace('{ name: verifier, function: "profuser.demo.verify:score" }', judge))
    found, _, err = run_command("prepare", "--config", "recipe.yaml", "--store", "new")
    assert (found, err.count("\n")) == (code, 1), err
    assert says in err


def test_a_recipe_with_these_judges_can_be_written_down_and_read_again():
    judge = JudgeConfig(name="a", server="http://h/v1", rubric=RubricConfig(lowest=0))
    assert isinstance(judge.server, ServerConfig)
    assert json.dumps(vars(judge.server))
