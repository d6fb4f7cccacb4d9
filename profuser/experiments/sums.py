"""The sums of `number_fusion.py`: problems with worked answers, two tokenizers that differ in numbers only, and tiny models.

A worked answer states the sum, with the two numbers in either order, and then adds column by column, as in

    1347+58=?
    58+1347. 8+7=15. 50+40+15=105. 300+105=405. 1000+405=1405. Answer: 1405.

It is full of numbers of one to four digits. With which number it begins is the writer's choice, one time out of two each, so the
true distribution of its first number is known and is not certain, as the distributions of a real model mostly are not.

Both tokenizers are byte-level BPEs with the same words. `single` cuts numbers into digits, as Qwen-2 does, and `triple` into up to
three digits from the left, as Llama-3 and DeepSeek-V3 do, and has all 1,110 such numbers.
"""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from profuser.demo.pretrain import SourceSpec, batch_of, config_of, optimise
from profuser.demo.tokenizers import CHATML, MAX_LENGTH
from profuser.text.chat import ChatFormat

SMALLEST, LARGEST = 10, 9999
"""The smallest number that is added, and the largest sum."""
LENGTHS = (2, 3, 4)
SLIPS = (-2, -1, 1, 2)


@dataclass(frozen=True, slots=True)
class Sum:
    """One problem with its worked answer. `wrong` says that a step of it has a slip, with which the answer goes on."""

    first: int
    second: int
    swapped: bool
    slip: int = 0
    at: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """What two splits must not share."""
        return min(self.first, self.second), max(self.first, self.second)

    @property
    def prompt(self) -> str:
        return f"{self.first}+{self.second}=?"

    @property
    def answer(self) -> str:
        """The right answer."""
        return str(self.first + self.second)

    @property
    def stated(self) -> tuple[int, int]:
        """The two numbers in the order in which the worked answer adds them."""
        return (self.second, self.first) if self.swapped else (self.first, self.second)

    def steps(self) -> list[tuple[list[int], int]]:
        """The columns from the right, each as what is added and the sum so far."""
        left, right = (str(number)[::-1] for number in self.stated)
        steps, total = [], 0
        for column, digits in enumerate(itertools.zip_longest(left, right)):
            added = [int(digit) * 10**column for digit in digits if digit is not None]
            if column:
                added.append(total)
            total = sum(added) + (self.slip * 10**column if column == self.at else 0)
            steps.append((added, total))
        return steps

    @property
    def worked(self) -> str:
        steps = self.steps()
        columns = " ".join(f"{'+'.join(map(str, added))}={total}." for added, total in steps)
        return f"{'+'.join(map(str, self.stated))}. {columns} Answer: {steps[-1][1]}."

    @property
    def terse(self) -> str:
        return f"Answer: {self.steps()[-1][1]}."


def drawn(rng: random.Random) -> Sum:
    """A sum of two numbers of two to four digits, every pair of lengths equally often unless the sum is too large."""
    while True:
        first, second = (rng.randrange(10 ** (n - 1), 10**n) for n in rng.choices(LENGTHS, k=2))
        if first + second <= LARGEST:
            return Sum(first, second, rng.random() < 0.5)


def slipped(problem: Sum, rng: random.Random) -> Sum:
    """The problem with a slip in one of its steps, which leaves no sum below 0 and none too large."""
    while True:
        columns = len(problem.steps())
        wrong = Sum(problem.first, problem.second, problem.swapped, rng.choice(SLIPS), rng.randrange(columns))
        if all(0 <= total <= LARGEST for _, total in wrong.steps()):
            return wrong


class Sums:
    """The splits: problems to fuse on and held-out ones that share no pair of numbers, and all others to pre-train on.

    Args:
        terse, wrong: the shares of the fusion ground truths that are terse, and that have a slip. They are drawn independently.
    """

    def __init__(self, fusion: int, heldout: int, *, terse: float = 0.4, wrong: float = 0.1):
        rng = random.Random("sums")
        problems: dict[tuple[int, int], Sum] = {}
        while len(problems) < fusion + heldout:
            problem = drawn(rng)
            problems.setdefault(problem.key, problem)
        self.heldout, self.fusion = list(problems.values())[:heldout], list(problems.values())[heldout:]
        self._reserved = set(problems)
        self._terse = set(rng.sample(range(fusion), round(terse * fusion)))
        self._wrong = set(rng.sample(range(fusion), round(wrong * fusion)))

    def fusion_rows(self) -> list[dict]:
        """The fusion data, with its flaws."""
        rows = []
        rng = random.Random("slips")
        for i, problem in enumerate(self.fusion):
            stated = slipped(problem, rng) if i in self._wrong else problem
            rows.append(row_of(problem) | {"response": stated.terse if i in self._terse else stated.worked})
        return rows

    def heldout_rows(self) -> list[dict]:
        return [row_of(problem) for problem in self.heldout]

    def pretraining(self, rng: random.Random) -> Iterator[Sum]:
        """Problems that are in no split, without an end."""
        while True:
            problem = drawn(rng)
            if problem.key not in self._reserved:
                yield problem


def row_of(problem: Sum) -> dict:
    """The problem as a row of data, with its right worked answer as the ground truth."""
    return {
        "prompt": problem.prompt,
        "response": problem.worked,
        "skill": "sums",
        "answer": problem.answer,
    }


# -- tokenizers --------------------------------------------------------------------------------------------------------

DIGITS_AT_ONCE = {"single": 1, "triple": 3}
WORDS = ("user", "assistant", " Answer", "Answer", "=?", "\n")
REST = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Llama-3's and Qwen-2's rule for pre-tokens, without the English contractions."""


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """One of the two tokenizers, in ChatML's template."""
    specials = ["<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(REST % DIGITS_AT_ONCE[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [word for word in WORDS for _ in range(2)],
        trainers.BpeTrainer(
            special_tokens=[AddedToken(s, special=True, normalized=False) for s in specials],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    state = json.loads(tokenizer.to_str())
    # Llama-3's tokenizer takes a pre-token that is in its vocabulary as it is, whatever its merges are.
    state["model"]["ignore_merges"] = True
    vocabulary = state["model"]["vocab"]
    for size in range(2, DIGITS_AT_ONCE[name] + 1):
        for digits in itertools.product("0123456789", repeat=size):
            number = "".join(digits)
            vocabulary[number] = len(vocabulary)
            state["model"]["merges"].append([number[:-1], number[-1]])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        chat_template=CHATML,
        model_max_length=MAX_LENGTH,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )


# -- models ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a model is trained before the fusion."""

    steps: int
    batch_size: int = 32
    lr: float = 4e-3
    seed: int = 0


SPEC = SourceSpec(
    name="adder",
    skill="",
    architecture="llama",
    tokenizer="",
    template=CHATML,
    hidden=96,
    layers=2,
    intermediate=256,
)


def spell_numbers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    """Begins the embeddings and the head's rows of numbers with the sum of one vector per digit and place, and one per length.

    A large model's embeddings of numbers tell their digits. A tiny one has no time to learn a thousand numbers one by one.
    """
    numbers = {token: i for token, i in tokenizer.get_vocab().items() if token.isdecimal()}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert isinstance(layer, torch.nn.Embedding | torch.nn.Linear)  # the model has not been sharded or quantised
        weight = layer.weight.data
        vectors = weight.std() * torch.randn(3, 11, weight.shape[1])
        for token, i in numbers.items():
            parts = [vectors[place, int(digit)] for place, digit in enumerate(token)]
            weight[i] = sum(parts, vectors[len(token) - 1, 10])


def pretrained(
    tokenizer: PreTrainedTokenizerFast, problems: Iterator[Sum], settings: Training, report: Callable[[str], None]
) -> PreTrainedModel:
    """Trains a model from random weights on worked answers."""
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(config_of(SPEC, tokenizer), dtype=torch.float32)
    spell_numbers(model, tokenizer)
    chat = ChatFormat(tokenizer)

    def loss_of_step(_: int) -> torch.Tensor:
        batch = itertools.islice(problems, settings.batch_size)
        return model(**batch_of(chat, [(p.prompt, p.worked) for p in batch])).loss

    optimise(model, loss_of_step, steps=settings.steps, lr=settings.lr, report=report)
    return model
