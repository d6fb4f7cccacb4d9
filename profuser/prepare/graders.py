"""Graders: judges that compare the answer in a response with the right one, without any model.

The right answer is the example's column `answer` or, without one, the ground truth. In a response and in a ground truth the answer is what
stands in the last \\\\boxed{}, behind the last ####, or behind the last "Answer:" (or "answer is") on its line; without any of these it is
all of the text. A score is 1 for a right answer and 0 for a wrong one, or reasoning-gym's own. A grader abstains where the example has no
answer of its kind.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any

from profuser.errors import ConfigError, DataError, in_short
from profuser.prepare.columns import is_missing
from profuser.recipe.schema import Grader

Scores = Callable[[dict[str, Any], Sequence[str]], list[float]]
"""What judges that are functions are: it gives an example and some responses one score each."""

NAMED = re.compile(r"\banswer\b\**(?:\s+is\b)?\s*[:=]?\**\s*", re.IGNORECASE)
AROUND = " *\"'`\u2018\u2019\u201c\u201d\u201e\u00ab\u00bb"
"""What may stand around an answer without being a part of it: stars and quotes, also those of typesetters."""
BEHIND = f"{AROUND}."
"""What may stand behind one. In front, a full stop can begin a number."""
NOT_OF_ITS_KIND = (ArithmeticError, AttributeError, LookupError, SyntaxError, TypeError, ValueError)
"""What some of reasoning-gym's tasks raise where an answer is not of their kind, such as a word in place of numbers."""
WORDS = re.compile(r"\(?[^\W\d_]\)?|[^\W\d_]+(?:['\u2019][^\W\d_]+|-[^\W\d_]{2,}|[.,]? [^\W\d_]+)*")
"""An answer that is none of mathematics: a letter, as of a choice, or words. A hyphen between single letters is a minus."""
NUMBER = re.compile(
    r"(?<![\w.])(?P<sign>[-+\u2212]?)[$\u20ac\u00a3]?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<part>\.\d+)?"
    r"(?:[eE](?P<power>[-+]?\d{1,3})(?![\w]))?(?:\s?/\s?(?P<below>\d+(?:\.\d+)?))?(?!\d)"
)


def grader(kind: Grader) -> Scores:
    """Returns the grader of a kind.

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    return GRADERS[kind]()


def answer_in(text: str) -> str:
    """Returns the answer that a text comes to."""
    boxed = text.rfind("\\boxed{")
    if boxed >= 0:
        return _in_braces(text[boxed + len("\\boxed{") :]).strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    marks = [
        mark for mark in NAMED.finditer(text) if mark[0].rstrip("* \t\n")[-1:] in (":", "=") or " is" in mark[0].lower()
    ]
    if marks:
        answer = text[marks[-1].end() :].strip().partition("\n")[0].strip("* \t")
        return answer or text.strip()
    return text.strip()


def _in_braces(text: str) -> str:
    """The text up to the brace that closes one before it."""
    depth = 1
    for n, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:n]
    return text


def right_answer(example: dict[str, Any]) -> str:
    """Returns the right answer to an example."""
    own = example.get("answer")
    if not is_missing(own) and str(own).strip():
        return str(own).strip()
    return answer_in(example["response"])


def plain(answer: str) -> str:
    """An answer as answers are compared as texts: without case, extra whitespace, and what stands around it."""
    return bare(" ".join(answer.split())).casefold()


def bare(answer: str) -> str:
    """An answer without what stands around it."""
    return answer.strip(AROUND).rstrip(BEHIND)


def exact() -> Scores:
    """The answers are the same text, but for case, whitespace, and the quotes and stars around them or full stops behind them."""

    def score(example: dict[str, Any], responses: Sequence[str]) -> list[float]:
        right = plain(right_answer(example))
        return [float(plain(answer_in(r)) == right) if right else math.nan for r in responses]

    return score


def number() -> Scores:
    """The last numbers of the answers are equal: 1,200 and 1200.0 and 2400/2 are, and 50% is 50."""

    def score(example: dict[str, Any], responses: Sequence[str]) -> list[float]:
        right = number_in(right_answer(example))
        return [float(number_in(answer_in(r)) == right) if right is not None else math.nan for r in responses]

    return score


def number_in(text: str) -> Fraction | None:
    """Returns the last number of a text, exactly; None without any."""
    found = None
    for match in NUMBER.finditer(text):
        if match["whole"] is None and match["part"] is None:
            continue
        try:
            value = Fraction(Decimal((match["whole"] or "0").replace(",", "") + (match["part"] or "")))
        except InvalidOperation:
            continue
        value *= Fraction(10) ** int(match["power"] or 0)
        below = Fraction(Decimal(match["below"] or 1))  # a Fraction of a text has a limit of 4,300 digits
        if below:
            found = (-value if match["sign"] in ("-", "\u2212") else value) / below
    return found


def maths() -> Scores:
    """math-verify says that the answers are the same: 1/2 and \\\\frac{2}{4}, or {1, 2} and {2, 1}."""
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ConfigError(
            f"the grader maths needs the package math-verify, which cannot be imported ({error}); run `pip install 'profuser[maths]'`"
        ) from None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it warns of every text that it cannot read

    def score(example: dict[str, Any], responses: Sequence[str]) -> list[float]:
        right = right_answer(example)
        if WORDS.fullmatch(bare(right)):  # math-verify would read a word as a product of its letters
            return [math.nan] * len(responses)
        gold = parse(as_latex(right)) or parse(right)
        if not gold:
            return [math.nan] * len(responses)

        def is_right(response: str) -> bool:
            # math-verify finds numbers in prose, and terms only where they are marked as LaTeX.
            answer = answer_in(response)
            if plain(answer) == plain(right) or verify(gold, parse(response)):
                return True
            return answer != response.strip() and verify(gold, parse(as_latex(bare(answer))))

        return [float(is_right(response)) for response in responses]

    def as_latex(text: str) -> str:
        return text if "$" in text or "\\boxed" in text else f"${text}$"

    return score


def reasoning_gym() -> Scores:
    """reasoning-gym's own score of an answer. The example has the columns `question`, `answer` and `metadata`, or all of it as `entry`."""
    try:
        import reasoning_gym as gym
    except ImportError as error:
        raise ConfigError(
            f"the grader reasoning_gym needs the package reasoning-gym, which cannot be imported ({error}); run "
            "`pip install reasoning-gym`"
        ) from None

    def of_one(own: Callable[[Any, dict[str, Any]], float], answer: Any, entry: dict[str, Any]) -> float:
        try:
            return float(own(answer, entry))
        except NOT_OF_ITS_KIND:
            own(entry["answer"], entry)  # what is wrong with the entry itself stays an error
            return 0.0

    def score(example: dict[str, Any], responses: Sequence[str]) -> list[float]:
        entry = _entry(example)
        task = entry["metadata"].get("source_dataset") or example.get("skill")
        try:
            own: Any = gym.get_score_answer_fn(str(task))
        except ValueError:
            raise DataError(
                f"an example of reasoning-gym must have its task as metadata.source_dataset, got {in_short(task)}; keep the metadata"
            ) from None
        return [of_one(own, answer_in(response), entry) for response in responses]

    return score


def _entry(example: dict[str, Any]) -> dict[str, Any]:
    """An example as reasoning-gym made it. In a table its mappings may be written as JSON."""
    entry: Any = example.get("entry") or {
        "question": example["prompt"], "answer": example.get("answer", example["response"]), "metadata": example.get("metadata"),
    }  # fmt: skip
    try:
        entry = json.loads(entry) if isinstance(entry, str) else dict(entry)
        entry["metadata"] = (
            json.loads(entry["metadata"]) if isinstance(entry["metadata"], str) else dict(entry["metadata"])
        )
    except (ValueError, TypeError, KeyError):
        raise DataError(
            "an example of reasoning-gym must have its `metadata`, a mapping or its JSON, got "
            f"{in_short(entry)}; keep the column, or use another grader"
        ) from None
    return entry


GRADERS: dict[Grader, Callable[[], Scores]] = {
    "exact": exact,
    "number": number,
    "maths": maths,
    "reasoning_gym": reasoning_gym,
}
