"""What the sources compute is what they are asked, and not what a user has already or a route asks of others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from profuser.plan.asked import asked_of_each
from profuser.plan.plan import Plan, make_plan
from profuser.recipe.parse import parse_run
from profuser.recipe.schema import Choice


def planned(choice: Choice = "min_ce", responses: str | None = None, logprobs: str | None = None) -> Plan:
    of = parse_run("train", [])
    recipe = replace(
        of.recipe,
        sources=[replace(source, responses=responses, logprobs=logprobs) for source in of.recipe.sources],
        capture=replace(of.recipe.capture, choice=choice),
    )
    of = replace(of, recipe=recipe)
    return make_plan(of, processes=(1,), instructions=900, tokens=90, timed=False)


def flops(plan: Plan) -> dict[str, float]:
    return {work.phase: work.flops for work in plan.work}


@pytest.mark.parametrize(
    ("judges", "heldout", "answers"),
    [
        (True, True, (True, True)),
        (True, False, (True, False)),
        (False, True, (False, True)),
        (False, False, (False, False)),
    ],
)
def test_training_prompts_are_answered_for_judges_and_held_out_ones_for_the_scores(judges, heldout, answers):
    recipe = parse_run("train", []).recipe
    data = recipe.data if heldout else replace(recipe.data, heldout=None)
    recipe = replace(recipe, judges=recipe.judges if judges else [], data=data)
    asked = asked_of_each(recipe, None)["scholar"]
    assert (asked.answers, asked.answers_heldout) == answers


def test_given_responses_are_not_answered():
    usual, given = planned(), planned(responses="answers.jsonl")
    assert flops(given) == {phase: count for phase, count in flops(usual).items() if phase != "answer"}
    assert {model.doing for model in usual.preparing} - {model.doing for model in given.preparing} == {"answers"}


def test_given_logprobs_are_not_scored_again():
    usual, given = flops(planned()), flops(planned(logprobs="top.jsonl"))
    # The third of the responses that each source wins is left.
    assert given["score"] == pytest.approx(usual["score"] / 4)
    assert given | {"score": usual["score"]} == usual


def test_a_route_asks_one_source_in_place_of_three():
    usual, routed = planned(), planned("route")
    shares = {phase: flops(routed)[phase] / flops(usual)[phase] for phase in ("score", "answer")}
    assert shares == pytest.approx({"score": (1 / 3 + 1 / 3) / (1 + 1 / 3), "answer": 1 / 3})
    assert routed.store["targets"] == usual.store["targets"]
    assert routed.store["scholar"] < 0.8 * usual.store["scholar"]
    assert set(routed.assumed) - set(usual.assumed) == {
        "the routes name all sources equally often (capture.choice: route)"
    }
