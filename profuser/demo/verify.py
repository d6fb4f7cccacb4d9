"""The demo's programmatic judge, `score`, and its measure of success, `exact_match`.

The verifier sees what a training row holds, the imperfect ground truth, and what the sources said; never the clean answer.
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
    """The text after the last `Answer:` without its final period; None where there is none."""
    _, found, answer = response.rpartition("Answer:")
    return answer.strip().removesuffix(".").strip() if found else None


def exact_match(example: dict, response: str) -> bool:
    """Whether the response's answer is the row's clean one (`example["answer"]`)."""
    return answer_of(response) == str(example["answer"])


def steps_hold(response: str) -> bool | None:
    """Whether every step such as `8-4=4` is right, starts from the step before and ends at the answer; None without steps."""
    steps = [(int(a), op, int(b), int(c)) for a, op, b, c in STEP.findall(response)]
    if not steps:
        return None
    right = all((a + b if op == "+" else a - b) == c for a, op, b, c in steps)
    chained = all(before[3] == after[0] for before, after in pairwise(steps))
    return right and chained and answer_of(response) == str(steps[-1][3])


def steps_follow(prompt: str, response: str) -> bool:
    """Whether the numbers that the steps use are the prompt's, in order."""
    steps = STEP.findall(response)
    return bool(steps) and [steps[0][0], *(b for _, _, b, _ in steps)] == re.findall(r"\d+", prompt)


def score(example: dict, responses: list[str]) -> list[float]:
    """One score a response: form, arithmetic that can be checked, agreement with the ground truth's and the others' answers.

    Args:
        example: the training row; prompt and response (its ground truth) are read.
        responses: the sources' responses to the prompt, in source order.
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
