"""The demo's judge that is a program, `score`, and its measure of success, `exact_match`.

The judge sees a training row, whose ground truth is imperfect, and the responses of the sources. It never reads the clean
answer.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

STEP = re.compile(r"(\d+)([+-])(\d+)=(-?\d+)")
WELL_FORMED = re.compile(r"(?:[^.]+\. )*Answer: [^.:]+\.")

WEIGHT_FORM = 1.0
WEIGHT_STEPS = 2.0
WEIGHT_TRUTH = 2.0
WEIGHT_OTHERS = 1.0
WEIGHT_EXPLAINED = 0.5


def answer_of(response: str) -> str | None:
    """The text after the last `Answer:`, without its final period; None if the response has no `Answer:`."""
    _, found, answer = response.rpartition("Answer:")
    return answer.strip().removesuffix(".").strip() if found else None


def exact_match(example: dict, response: str) -> bool:
    """Whether the response's answer is the row's clean answer, `example["answer"]`."""
    return answer_of(response) == str(example["answer"])


def steps_hold(response: str) -> bool | None:
    """Whether every step (such as `8-4=4`) is right, each starts where the one before ended, and the last gives the answer.

    None if the response has no steps.
    """
    steps = [(int(a), op, int(b), int(c)) for a, op, b, c in STEP.findall(response)]
    if not steps:
        return None
    right = all((a + b if op == "+" else a - b) == c for a, op, b, c in steps)
    chained = all(before[3] == after[0] for before, after in pairwise(steps))
    return right and chained and answer_of(response) == str(steps[-1][3])


def steps_follow(prompt: str, response: str) -> bool:
    """Whether the steps use the numbers of the prompt, in the order of the prompt."""
    steps = STEP.findall(response)
    return bool(steps) and [steps[0][0], *(b for _, _, b, _ in steps)] == re.findall(r"\d+", prompt)


def score(example: dict, responses: list[str]) -> list[float]:
    """Gives every response one score.

    It adds up points for the form, for arithmetic that can be checked, for the ground truth's answer, and for answers on
    which the sources agree.

    Args:
        example: the training row, of which the prompt and the response (its ground truth) are read.
        responses: the sources' responses to the prompt, in the order of the sources.
    """
    truth = answer_of(example["response"])
    answers = [answer_of(response) for response in responses]
    votes = Counter(answer for answer in answers if answer is not None)
    scores = []
    for response, answer in zip(responses, answers):
        value = WEIGHT_FORM * bool(WELL_FORMED.fullmatch(response))
        value += WEIGHT_EXPLAINED * (not response.startswith("Answer:"))
        if (sound := steps_hold(response)) is not None:
            value += WEIGHT_STEPS * (1 if sound and steps_follow(example["prompt"], response) else -1)
        if answer is not None:
            value += WEIGHT_TRUTH * (answer == truth)
            value += WEIGHT_OTHERS * (votes[answer] - 1) / max(len(responses) - 1, 1)
        scores.append(value)
    return scores
