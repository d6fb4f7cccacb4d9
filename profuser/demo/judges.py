"""The demo's two reward models.

Each is first trained as a language model of the fusion data's ground truths. Its body then gets a head with one output, the
score, and learns from preference pairs with the Bradley-Terry loss, -log sigmoid(r_chosen - r_rejected). All pairs are
made from the fusion data as it is, terse and wrong ground truths included. So no judge sees a truth that the fusion data
does not hold, and none sees a source's response.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from profuser.demo.pretrain import SourceSpec, config_of, optimise
from profuser.demo.pretrain import batch_of as labelled_batch
from profuser.demo.skills import GAINS, ITEMS, LOSSES, MAX_TOTAL, PEOPLE, SKILLS
from profuser.demo.tokenizers import CHATML_END, VICUNA
from profuser.demo.verify import STEP, answer_of
from profuser.models.padding import padded
from profuser.prepare.judges import Judge
from profuser.text.chat import ChatFormat
from profuser.text.template import conversation

JUDGES = (
    SourceSpec(
        name="judge-a", skill="", architecture="llama", tokenizer="wide", template=CHATML_END, hidden=96, layers=3, intermediate=192
    ),
    SourceSpec(
        name="judge-b", skill="", architecture="gpt_neox", tokenizer="narrow", template=VICUNA, hidden=96, layers=3, intermediate=384
    ),
)  # fmt: skip
MILD = 0.5
"""The weight of a pair that prefers a worked ground truth to its own answer without the explanation."""
THING = re.compile(r"\b(?:an?|the) (\w+)")


@dataclass(frozen=True, kw_only=True)
class JudgeSettings:
    """How a judge is trained."""

    language_steps: int = 600
    """Optimizer steps as a language model of the ground truths."""
    language_batch_size: int = 48
    language_lr: float = 3e-3
    steps: int = 900
    """Optimizer steps on preference pairs."""
    batch_size: int = 32
    """Preference pairs per step."""
    lr: float = 7e-4
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Pair:
    """Two responses to one prompt. A judge should give `chosen` a higher score than `rejected`."""

    prompt: str
    chosen: str
    rejected: str
    weight: float
    kind: str


class PairMaker:
    """Draws preference pairs from the rows of the fusion data, of which it reads prompt, response and skill."""

    def __init__(self, rows: Sequence[dict]):
        self.rows = rows
        self.worked = {
            skill: [
                row["response"] for row in rows if row["skill"] == skill and not row["response"].startswith("Answer:")
            ]
            for skill in SKILLS
        }
        self.answers = {
            skill: sorted({_answer(row["response"]) for row in rows if row["skill"] == skill}) for skill in SKILLS
        }
        steps = [step for text in self.worked["reasoning"] for step in STEP.findall(text)]
        self.steps = [(int(a), op, int(b), int(c)) for a, op, b, c in steps]
        # The responses to the same kind of question: those about a colour are the peers of one another.
        self.peers: dict[str, list[str]] = {}
        for row in rows:
            self.peers.setdefault(_topic(row), []).append(row["response"])

    def draw(self, rng: random.Random) -> Pair:
        row = rng.choice(self.rows)
        kinds = (
            self._other_answer,
            self._other_explanation,
            self._own_words,
            lambda _, rng: self.recombined(rng),
            self._malformed,
            self._other_skill,
            self._terser,
        )
        make = rng.choices(kinds, (4, 4, 4, 2, 1.5, 0.5, 2))[0]
        made = make(row, rng)
        return self.draw(rng) if made is None or made.chosen == made.rejected else made

    def _wrong_answer(self, row: dict, rng: random.Random) -> str:
        right = _answer(row["response"])
        pool = {_answer(peer) for peer in self.peers[_topic(row)]} - {right}
        return rng.choice(sorted(pool) or self.answers[row["skill"]])

    def _explained(self, row: dict, answer: str, rng: random.Random) -> str:
        """A worked response that ends in `answer`, with the explanation of another row, fitted to this prompt."""
        if row["skill"] == "reasoning":
            numbers = [int(n) for n in re.findall(r"\d+", row["prompt"])]
            total, steps = numbers[0], []
            for i, change in enumerate(numbers[1:], start=1):
                result = int(answer) if i == len(numbers) - 1 else rng.randint(0, MAX_TOTAL)
                steps.append(
                    f"{total}{rng.choice('+-') if change > total else '-' if result < total else '+'}{change}={result}."
                )
                total = result
            return f"{' '.join(steps)} Answer: {answer}."
        explanation = rng.choice(self.worked[row["skill"]]).split(" Answer:")[0]
        return f"{_fitted(explanation, row)} Answer: {answer}."

    def _other_answer(self, row: dict, rng: random.Random) -> Pair:
        """The ground truth is preferred to itself with a wrong answer in place of its own."""
        truth = row["response"]
        before, _, _ = truth.rpartition("Answer:")
        return Pair(row["prompt"], truth, f"{before}Answer: {self._wrong_answer(row, rng)}.", 1.0, "answer")

    def _other_explanation(self, row: dict, rng: random.Random) -> Pair | None:
        """The ground truth is preferred to one that belongs to another thing, act or sum, or to its own sum with a slip."""
        if row["skill"] == "reasoning":
            if not STEP.search(row["response"]):
                return None
            rejected = slipped(row["response"], rng) if rng.random() < 0.7 else rng.choice(self.worked["reasoning"])
            return Pair(row["prompt"], row["response"], rejected, 1.0, "explanation")
        other = rng.choice(self.peers[_topic(row)])
        if other.startswith("Answer:") or answer_of(other) == answer_of(row["response"]):
            return None
        # A source confuses things in two ways: it gives a thing the properties of another, or it talks of the other one.
        rejected = _fitted(other, row) if rng.random() < 0.6 else other
        return Pair(row["prompt"], row["response"], rejected, 1.0, "explanation")

    def _own_words(self, row: dict, rng: random.Random) -> Pair:
        """The ground truth's answer is preferred to a wrong one, with whatever explanation, or none, on either side."""
        right, wrong = _answer(row["response"]), self._wrong_answer(row, rng)
        # In reasoning only the ground truth's own steps are sound, so no other steps may stand in a chosen response.
        explained = row["response"] if row["skill"] == "reasoning" else self._explained(row, right, rng)
        case = rng.random()
        if case < 0.25:
            chosen, rejected = f"Answer: {right}.", self._explained(row, wrong, rng)
        elif case < 0.5:
            chosen, rejected = explained, f"Answer: {wrong}."
        elif row["skill"] == "reasoning":
            chosen, rejected = explained, self._explained(row, wrong, rng)
        else:
            chosen, rejected = explained, f"{explained.rpartition('Answer:')[0]}Answer: {wrong}."
        return Pair(row["prompt"], chosen, rejected, 1.0, "own words")

    def recombined(self, rng: random.Random) -> Pair:
        """A new sum of two steps from different ground truths is preferred to the same sum with a slip.

        Every prompt of the demo has three steps. A sum of two steps is therefore none of them, and no held-out one either.
        """
        first = rng.choice(self.steps)
        following = [step for step in self.steps if step[0] == first[3]]
        if not following:
            return self.recombined(rng)
        second = rng.choice(following)
        changes = ", ".join(f"{rng.choice(GAINS if op == '+' else LOSSES)} {b}" for _, op, b, _ in (first, second))
        prompt = f"{rng.choice(PEOPLE)} has {first[0]} {rng.choice(ITEMS)}, {changes}. How many?"
        chosen = " ".join(f"{a}{op}{b}={c}." for a, op, b, c in (first, second)) + f" Answer: {second[3]}."
        return Pair(prompt, chosen, slipped(chosen, rng), 1.0, "recombined")

    def _malformed(self, row: dict, rng: random.Random) -> Pair:
        """The ground truth is preferred to itself cut short, repeated, shuffled, or without its answer or its period."""
        truth = row["response"]
        words = truth.split()
        broken = rng.choice(
            (
                " ".join(words[: rng.randint(1, len(words) - 1)]),
                f"{truth} {truth}",
                " ".join(rng.sample(words, len(words))),
                truth.replace("Answer:", "").strip(),
                truth.removesuffix("."),
            )
        )
        return Pair(row["prompt"], truth, broken, 1.0, "malformed")

    def _other_skill(self, row: dict, rng: random.Random) -> Pair | None:
        """The ground truth is preferred to a response from another skill, which can be a refusal to help."""
        other = rng.choice(self.rows)
        if other["skill"] == row["skill"]:
            return None
        return Pair(row["prompt"], row["response"], other["response"], 1.0, "other skill")

    def _terser(self, row: dict, rng: random.Random) -> Pair | None:
        """A worked ground truth is preferred, with the small weight MILD, to its answer without the explanation."""
        if row["response"].startswith("Answer:"):
            return None
        return Pair(row["prompt"], row["response"], f"Answer: {answer_of(row['response'])}.", MILD, "terser")


def slipped(response: str, rng: random.Random) -> str:
    """Worked arithmetic in which one step is wrong; the error may or may not be carried on to later steps and the answer."""
    steps = [[int(a), op, int(b), int(c)] for a, op, b, c in STEP.findall(response)]
    at = rng.randrange(len(steps))
    steps[at][3] += rng.choice((-2, -1, 1, 2))
    if rng.random() < 0.7:
        for before, after in zip(steps[at:], steps[at + 1 :]):
            after[0] = before[3]
            after[3] = after[0] + (after[2] if after[1] == "+" else -after[2])
    answer = steps[-1][3] if rng.random() < 0.8 else answer_of(response)
    return " ".join(f"{a}{op}{b}={c}." for a, op, b, c in steps) + f" Answer: {answer}."


def _answer(truth: str) -> str:
    """The answer of a ground truth of the fusion data. Every ground truth there has one."""
    answer = answer_of(truth)
    assert answer is not None
    return answer


def _topic(row: dict) -> str:
    """What the prompt asks for: the property's name if it is a knowledge prompt, and otherwise the skill."""
    if row["skill"] != "knowledge":
        return row["skill"]
    for topic, words in TOPIC_WORDS.items():
        if any(word in row["prompt"] for word in words):
            return topic
    return row["skill"]


TOPIC_WORDS = {
    "taste": ("taste",),
    "color": ("color",),
    "place": ("Where", "where", "place"),
    "sound": ("sound", "hear"),
    "weight": ("heavy", "weight"),
    "season": ("When", "when", "season"),
}


def _fitted(text: str, row: dict) -> str:
    """`text`, another row's response, with the thing or act of this row's prompt in place of its own."""
    if row["skill"] == "knowledge":
        thing = THING.findall(row["prompt"])[-1]
        return re.sub(r"^An? \w+", f"A{'n' if thing[0] in 'aeiou' else ''} {thing}", text)
    if row["skill"] == "safety":
        act = re.search(r"(\w+) the \w+[?.]$", row["prompt"])
        assert act is not None
        return re.sub(r"^To \w+", f"To {act[1]}", text)
    return text


def batch_of(chat: ChatFormat, pairs: Sequence[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Pads whole (prompt, response) conversations on the right, as a judge will score them."""
    rows = chat.template.many_ids([conversation(prompt, response) for prompt, response in pairs])
    input_ids, attention_mask = padded(rows, chat.tokenizer.pad_token_id)
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def train_judge(
    spec: SourceSpec,
    rows: Sequence[dict],
    tokenizer: PreTrainedTokenizerFast,
    settings: JudgeSettings,
    report: Callable[[str], None] = print,
) -> PreTrainedModel:
    """Trains one reward model in fp32: a language model of the ground truths, whose body then learns the preferences."""
    torch.manual_seed(settings.seed)
    rng, chat, maker = random.Random(f"{settings.seed} {spec.name}"), ChatFormat(tokenizer), PairMaker(rows)
    config = config_of(spec, tokenizer, num_labels=1)
    language_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    pairs = [(row["prompt"], row["response"]) for row in rows]

    def likelihood(_: int) -> torch.Tensor:
        drawn = rng.sample(pairs, settings.language_batch_size * 3 // 4)
        sums = [maker.recombined(rng) for _ in range(settings.language_batch_size - len(drawn))]
        return language_model(**labelled_batch(chat, [*drawn, *((p.prompt, p.chosen) for p in sums)])).loss

    def preference(_: int) -> torch.Tensor:
        drawn = [maker.draw(rng) for _ in range(settings.batch_size)]
        texts = [(p.prompt, p.chosen) for p in drawn] + [(p.prompt, p.rejected) for p in drawn]
        chosen, rejected = model(**batch_of(chat, texts)).logits[:, 0].chunk(2)
        weights = torch.tensor([p.weight for p in drawn])
        return (weights * -logsigmoid(chosen - rejected)).sum() / weights.sum()

    def named(line: str) -> None:
        report(f"{spec.name}: {line}")

    optimise(language_model, likelihood, steps=settings.language_steps, lr=settings.language_lr, report=named)
    model.base_model.load_state_dict(language_model.base_model.state_dict())
    optimise(model, preference, steps=settings.steps, lr=settings.lr, report=named)
    return model


def pairwise_accuracy(judge: Judge, rows: Sequence[dict], count: int = 1500, seed: int = 1) -> dict[str, float]:
    """The percentage of newly drawn pairs in which the judge prefers the chosen response, by kind of pair and over all."""
    maker, rng = PairMaker(rows), random.Random(f"{seed} pairwise")
    pairs = [maker.draw(rng) for _ in range(count)]
    scores = judge([{"prompt": p.prompt} for p in pairs], [(p.chosen, p.rejected) for p in pairs])
    hits: dict[str, list[bool]] = {"all": []}
    for pair, (chosen, rejected) in zip(pairs, scores):
        hits.setdefault(pair.kind, []).append(chosen > rejected)
        hits["all"].append(chosen > rejected)
    return {kind: 100 * sum(right) / len(right) for kind, right in hits.items()}
