"""Likely mistakes in calling the loss: an error says what to change, or a check shows the mistake where no error can.

    python tests/test_mistakes.py > docs/mistakes.md

This makes the same mistakes and writes them as two tables.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from small_tokenizers import pretrained_tokenizer
from transformers import AutoModelForCausalLM

from profuser import IGNORE_INDEX, FusionModel, fused_linear_fusion_loss
from profuser.recipe.places import resolve

PAGE = Path(__file__).resolve().parent.parent / "docs" / "mistakes.md"
K = 4


@functools.cache
def texts() -> list[tuple[str, str]]:
    """One held-out prompt and response for every skill of the demo."""
    rows = (json.loads(line) for line in Path(resolve("demo:heldout.jsonl")).read_text().splitlines())
    return list({row["skill"]: (row["prompt"], row["response"]) for row in rows}.values())


@functools.cache
def good() -> dict:
    """The right call on the bundled guardian: three examples, and the model's own top-k as the only source."""
    model = AutoModelForCausalLM.from_pretrained(resolve("demo:guardian"), dtype=torch.float32)
    render: Any = pretrained_tokenizer(resolve("demo:guardian")).apply_chat_template
    hidden, ids, labels = [], [], []
    for prompt, response in texts():
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        whole = render(turns, return_tensors="pt", return_dict=True).input_ids
        start = len(render(turns[:1], add_generation_prompt=True, return_dict=True).input_ids)
        learnt = whole[0].clone()
        learnt[:start] = IGNORE_INDEX
        with torch.no_grad():
            hidden.append(model.base_model(whole).last_hidden_state[0, :-1])
        ids.append(whole[0, 1:])
        labels.append(learnt[1:])
    head = model.get_output_embeddings()
    states = torch.cat(hidden)
    with torch.no_grad():
        logprobs, top = head(states).log_softmax(-1).topk(K)
    lengths = torch.tensor([len(x) for x in labels])
    return {
        "model": model,
        "head": head,
        "ids": torch.cat(ids),
        "call": {
            "hidden": states,
            "weight": head.weight.detach(),
            "labels": torch.cat(labels),
            "source_ids": top[None],
            "source_logprobs": logprobs[None],
            "cu_seqlens": torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]),
        },
    }


def two_sources() -> dict:
    """The same call with two sources, and with the CE of both for each of the three sequences."""
    call = dict(good()["call"])
    for name in ("source_ids", "source_logprobs"):
        call[name] = call[name].expand(2, -1, -1)
    return call | {"source_ce": torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])}


def check(call: dict) -> dict[str, float]:
    """What the checks look at, over the labelled rows: the mean CE, the mean of the target's kept mass, and the largest KD."""
    _, stats = fused_linear_fusion_loss(**call, return_stats=True)
    rows = call["labels"] != IGNORE_INDEX
    means = {name: stats[name][rows].mean().item() for name in ("ce", "target_mass")}
    return means | {"kd": stats["kd"][rows].max().item()}


# The first half is about mistakes that end in an error.


@dataclass
class Wrong:
    """A mistake: how it changes a call, what the error must say, and which call is changed."""

    what: str
    change: Callable[[dict], dict]
    says: tuple[str, ...]
    call: Callable[[], dict] = two_sources
    error: type[Exception] = ValueError


def edit(**changes: Callable) -> Callable[[dict], dict]:
    return lambda call: {name: change(call[name]) for name, change in changes.items()}


def logits(call: dict) -> torch.Tensor:
    return call["hidden"] @ call["weight"].T


WRONG = [
    Wrong("logits instead of hidden states", lambda c: {"hidden": logits(c)}, ("weight must be (V, D)", "if hidden holds logits")),
    Wrong("the model's output instead of its hidden states", lambda c: {"hidden": good()["model"].base_model(good()["ids"][None])}, ("hidden must be a tensor", ".last_hidden_state"), error=TypeError),
    Wrong("hidden states with a batch axis", edit(hidden=lambda x: x[None]), ("hidden must be (N, D)", "flatten")),
    Wrong("the module `lm_head` instead of its weight", lambda c: {"weight": good()["head"]}, ("weight must be a tensor, got Linear", ".weight"), error=TypeError),
    Wrong("weight as (D, V)", edit(weight=lambda x: x.T), ("weight must be (V, D)", "transpose it")),
    Wrong("labels shifted, hidden states not", edit(labels=lambda x: x[1:]), ("labels must be (N,)", "the last hidden state of each sequence")),
    Wrong("float labels", edit(labels=lambda x: x.float()), ("labels must be int64 or int32", "labels.long()")),
    Wrong("one-hot labels", lambda c: {"labels": torch.nn.functional.one_hot(c["labels"].clamp(min=0), len(c["weight"]))}, ("labels must be (N,)", "argmax(-1)")),
    Wrong("labels of a larger vocabulary", edit(labels=lambda x: x + 1000), ("labels must be in [0, 1152)", "target's tokenizer")),
    Wrong("masked labels are -1, not -100", edit(labels=lambda x: x.masked_fill(x == IGNORE_INDEX, -1)), ("labels must be in [0, 1152)", "mark what is not learnt with -100")),
    Wrong("source ids of a larger vocabulary", edit(source_ids=lambda x: x + 1000), ("source_ids must be < 1152", "map the source's tokens")),
    Wrong("K before N: (S, K, N)", edit(source_ids=lambda x: x.mT, source_logprobs=lambda x: x.mT), ("source_ids must be (S, N, K)", "permute the axes")),
    Wrong("sources last: (N, K, S)", edit(source_ids=lambda x: x.permute(1, 2, 0), source_logprobs=lambda x: x.permute(1, 2, 0)), ("source_ids must be (S, N, K)", "permute the axes")),
    Wrong("K first, one source: (K, N, S)", edit(source_ids=lambda x: x.permute(2, 1, 0), source_logprobs=lambda x: x.permute(2, 1, 0)), ("a choice is needed", "put K last"), lambda: dict(good()["call"])),
    Wrong("S missing: (N, K)", edit(source_ids=lambda x: x[0], source_logprobs=lambda x: x[0]), ("source_ids must be (S, N, K)", "unsqueeze(0)"), lambda: dict(good()["call"])),
    Wrong("probabilities instead of log-probabilities", edit(source_logprobs=torch.exp), ("natural log-probabilities <= 0", "take log()")),
    Wrong("logits instead of log-probabilities", lambda c: {"source_logprobs": logits(c).gather(1, c["source_ids"][0]).expand(2, -1, -1)}, ("natural log-probabilities <= 0", "log_softmax() of logits")),
    Wrong("padded with the id 0 and log-probability 0, not the id -1", edit(source_ids=lambda x: x.index_fill(2, torch.tensor([3]), 0), source_logprobs=lambda x: x.index_fill(2, torch.tensor([3]), 0.0)), ("add up to a mass of", "pad with the id -1")),
    Wrong("log-probabilities in bf16", edit(source_logprobs=lambda x: x.bfloat16()), ("got torch.bfloat16", "log_softmax of logits.float()")),
    Wrong("the log of the tail's mass", lambda c: {"source_tail": (1 - c["source_logprobs"].exp().sum(-1)).log()}, ("linear mass in [0, 1]", "exp()")),
    Wrong("source_ce as (B, S)", edit(source_ce=lambda x: x.T), ("source_ce must be (S, B)", "transpose it")),
    Wrong("several sources without a choice", lambda c: {"source_ce": None}, ("a choice is needed", "source_ce, source_index or source_weight")),
    Wrong("several sequences without bounds", lambda c: {"cu_seqlens": None}, ("cu_seqlens is required when B > 1",)),
    Wrong("num_items_in_batch by example", lambda c: {"num_items_in_batch": torch.tensor([9, 8, 9])}, ("num_items_in_batch must be one number", "sum it over the optimizer step")),
    Wrong("beta and kd_weight", lambda c: {"beta": 0.3, "kd_weight": torch.ones(len(c["labels"]))}, ("beta or kd_weight, not both",)),
]  # fmt: skip


def message(wrong: Wrong) -> str:
    call = wrong.call()
    with pytest.raises(wrong.error) as error:
        fused_linear_fusion_loss(**call | wrong.change(call))
    return str(error.value)


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.what.replace(" ", "-"))
def test_the_error_says_what_to_change(wrong):
    text = message(wrong)
    assert "\n" not in text
    for part in wrong.says:
        assert part in text


# The second half is about mistakes with the right shapes and values.


@dataclass
class Silent:
    """A mistake that no error can show, with the figure that shows it, and the fix."""

    what: str
    change: Callable[[dict], dict]
    shows: str  # "ce", "kd" or "target_mass"
    fix: str


def unshifted(call: dict) -> dict:
    """Makes each row's label the last token that the row has read, and not the one that follows."""
    labels = call["labels"].roll(1)
    return {"labels": labels.where(call["labels"] != IGNORE_INDEX, IGNORE_INDEX)}


SILENT = [
    Silent("labels not shifted against hidden states", unshifted, "ce", "hidden[:-1] and labels[1:] of every sequence; `FusionModel` shifts by itself"),
    Silent("masked labels are 0, or the padding id, not -100", edit(labels=lambda x: x.clamp(min=0)), "ce", "`labels.masked_fill(mask == 0, IGNORE_INDEX)`"),
    Silent("not the model's softcap, logit scale or bias", lambda c: {"logit_scale": 0.5}, "ce", "pass softcap, logit_scale and bias; `FusionModel` reads them from the model"),
    Silent("base-2 logarithms", edit(source_logprobs=lambda x: x / math.log(2)), "kd", "natural logarithms: multiply by 0.6931"),
    Silent("source rows shifted by one", edit(source_ids=lambda x: x.roll(1, 1), source_logprobs=lambda x: x.roll(1, 1)), "kd", "row n holds the distribution of the token labels[n]"),
    Silent("log_softmax over the kept entries alone", edit(source_logprobs=lambda x: x.log_softmax(-1)), "kd", "log_softmax over the vocabulary first, then topk"),
    Silent("log-probabilities at temperature 1, the loss at 2", lambda c: {"temperature": 2.0}, "kd", "give source_logprobs at `temperature`: `(logits / T).log_softmax(-1)`"),
    Silent("the temperature applied twice", lambda c: {"temperature": 2.0, "source_logprobs": at_temperature(c, 4.0)}, "kd", "give source_logprobs at `temperature`, once"),
    Silent("source ids of another vocabulary, all below V", edit(source_ids=lambda x: (x + 400) % 1152), "target_mass", "map them with `align`"),
]  # fmt: skip


def at_temperature(call: dict, temperature: float) -> torch.Tensor:
    return (logits(call) / temperature).log_softmax(-1).gather(1, call["source_ids"][0])[None]


def test_the_right_call_passes_both_checks():
    call = good()["call"]
    found = check(call)
    ids, labels = good()["ids"], call["labels"]
    dense = torch.nn.functional.cross_entropy(good()["head"](call["hidden"]), labels)
    assert len(ids) == len(labels)
    assert found["ce"] == pytest.approx(dense.item(), abs=1e-5)
    assert found["kd"] == pytest.approx(0, abs=1e-5)
    right = at_temperature(call, 2.0)
    assert check(call | {"temperature": 2.0, "source_logprobs": right})["kd"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("silent", SILENT, ids=lambda silent: silent.what.replace(" ", "-"))
def test_a_check_shows_what_no_error_can(silent):
    call = good()["call"]
    right, wrong = check(call), check(call | silent.change(call))
    if silent.shows == "target_mass":
        assert wrong["target_mass"] < 0.1 < 0.9 < right["target_mass"]
    else:
        assert abs(wrong[silent.shows] - right[silent.shows]) > 0.05


def micro_batch_counts() -> tuple[float, float]:
    """The gradient's norm for a step in two halves, which are divided by the whole step's labels, or each by its own."""
    call = good()["call"]
    half = len(call["labels"]) // 2
    norms = []
    for whole_step in (True, False):
        weight = call["weight"].clone().requires_grad_()
        for rows in (slice(0, half), slice(half, None)):
            count = (call["labels"] != IGNORE_INDEX).sum() if whole_step else None
            fused_linear_fusion_loss(
                call["hidden"][rows], weight, call["labels"][rows], num_items_in_batch=count
            ).backward()
        norms.append(weight.grad.norm().item())
    return norms[0], norms[1]


def test_counting_labels_by_micro_batch_enlarges_the_gradient():
    right, wrong = micro_batch_counts()
    assert wrong > 1.5 * right


def mean_of_rows() -> tuple[float, float]:
    """The loss, and the mean over all rows of what reduction="none" gives."""
    call = good()["call"]
    right, rows = (fused_linear_fusion_loss(**call, reduction=reduction) for reduction in ("mean", "none"))
    return right.item(), rows.mean().item()


def test_a_mean_over_all_rows_counts_those_that_are_ignored():
    right, wrong = mean_of_rows()
    assert wrong < 0.9 * right


def without_sources() -> str:
    """What FusionModel says if a Trainer's collator has dropped the sources."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ids = good()["ids"][None]
        FusionModel(good()["model"]).train()(input_ids=ids, labels=ids)
    good()["model"].eval()
    return str(caught[-1].message)


def test_a_trainer_that_drops_the_sources_is_warned():
    assert "no source_ids" in without_sources()


def test_fusion_model_passes_the_first_check():
    fusion = FusionModel(good()["model"])
    ids = good()["ids"][None]
    ours = fusion(input_ids=ids, labels=ids)["loss"]
    assert ours.item() == pytest.approx(good()["model"](input_ids=ids, labels=ids).loss.item(), abs=1e-5)


# The page that the cases give.

HEAD = """\
# Likely mistakes

Every error below was raised by the loss, and every figure measured on the bundled `guardian`;
`python tests/test_mistakes.py > docs/mistakes.md` writes this page, and `tests/test_mistakes.py` tests the same cases.

## Errors

On a GPU a check of values would wait for the device, so there ids, labels and log-probabilities out of range make their rows'
loss NaN instead; run one batch on the CPU to read the error. Checks of shapes and dtypes are the same everywhere.

| mistake | what you see | what to change |
|---|---|---|
"""
CHECKS = """\

## What no error can show

Some mistakes have the right shapes and values in range. Two checks before the first step find them:

1. The mean of `stats["ce"]` (`return_stats=True`) over the labelled rows is the model's own loss, `model(input_ids=…, labels=…).loss`.
2. With the target's own top-k, sent through your code as if it were a source, `stats["kd"]` is 0 in every row.

Below, the figure that a mistake gives beside the right one.

| mistake | what you see | what to change |
|---|---|---|
"""


def page() -> str:
    rows = []
    for wrong in WRONG:
        seen, fix = message(wrong).split("; ", 1)
        rows.append(f"| {wrong.what} | `{seen}` | {fix} |")
    text = HEAD + "\n".join(rows) + "\n" + CHECKS
    right = check(good()["call"])
    names = {"ce": "check 1: CE", "kd": "check 2: KD up to", "target_mass": '`stats["target_mass"]`:'}
    for silent in SILENT:
        wrong = check(good()["call"] | silent.change(good()["call"]))
        seen = f"{names[silent.shows]} {wrong[silent.shows]:.2f}, right {abs(right[silent.shows]):.2f}"
        text += f"| {silent.what} | {seen} | {silent.fix} |\n"
    right, wrong = mean_of_rows()
    seen, fix = without_sources().split(": ", 1)
    text += (
        f'| `reduction="none"`, then a mean over all rows | {wrong:.2f}, right {right:.2f} | divide by the labelled rows, as "mean" does |\n'
        f"| the Trainer or its collator drops the sources | a warning: `{seen}` | {fix} |\n"
    )
    right, wrong = micro_batch_counts()
    text += (
        f"| labels counted by micro-batch, in two of them | a gradient {wrong / right:.1f} times as large | "
        "num_items_in_batch = the labels of the whole optimizer step, as the Trainer passes it |\n"
        '| source_ce as (B, S) where B = S | `stats["winner"]` does not follow your CE | transpose it |\n'
    )
    return text


def test_the_page_is_what_the_cases_give():
    found, expected = (re.sub(r"\d+\.\d+", "0.0", text) for text in (PAGE.read_text(), page()))  # all but the digits
    assert found == expected


if __name__ == "__main__":
    print(page(), end="")
