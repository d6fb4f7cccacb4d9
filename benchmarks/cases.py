"""The inputs of the benchmarks of the loss, the top-k and the training step: a table of shapes, and seeded tensors.

With TRITON_INTERPRET=1 the benchmarks run as on a GPU, with its names of shapes and the Triton kernels, but on a CPU and with tiny
shapes: that proves the calls, and times nothing.

Dimension letters: N rows, D hidden, V vocabulary, S sources, K kept entries, B sequences.
"""

from __future__ import annotations

import functools
import math
import os
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
INTERPRETED = DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
IMPL = "triton" if INTERPRETED else None
"""What profuser's functions are called with."""

LOGITS = ("random", "peaked")
# FuseLLM's distributions are a softmax over the kept entries, so no mass is outside of them.
TAIL = "renormalize"
TEACHER_ENTRIES = 4 if INTERPRETED else 10
"""How many of a dense teacher's entries profuser takes."""


class Shape(NamedTuple):
    N: int
    D: int
    V: int
    B: int
    rounds: int
    S: int = 3
    K: int = 10

    def __str__(self):
        return f"{self.N} x {self.D} x {self.V}, S={self.S}, K={self.K}"


SHAPES = {
    "cpu": {
        "demo": Shape(1500, 128, 768, B=48, rounds=10),
        "vocabulary-32k": Shape(512, 128, 32000, B=4, rounds=3),
        "smollm2": Shape(256, 576, 49152, B=2, rounds=3),
    },
    "cuda": {
        "4k-128k": Shape(4096, 4096, 128256, B=2, rounds=10),
        "8k-32k": Shape(8192, 4096, 32000, B=4, rounds=10),
        "16k-152k": Shape(16384, 4096, 151936, B=8, rounds=5),
    },
    "interpreted": {
        "4k-128k": Shape(4, 16, 400, B=2, rounds=1, K=4),
        "8k-32k": Shape(4, 16, 130, B=2, rounds=1, K=4),
        "16k-152k": Shape(6, 16, 500, B=2, rounds=1, K=4),
    },
}["interpreted" if INTERPRETED else DEVICE]
# Four sequences of 2048 tokens. This shape runs only on request, because the dense implementations take 13 GB and minutes.
HEADLINE = {"headline": Shape(8192, 128, 32000, B=4, rounds=2)}
ALL_SHAPES = SHAPES | HEADLINE


def chosen_shapes(config) -> dict[str, Shape]:
    return HEADLINE if config.getoption("--headline") else SHAPES


@functools.lru_cache(maxsize=1)
def make_case(shape: str, logits: str) -> dict[str, Any]:
    """The arguments of `fused_linear_fusion_loss`.

    "peaked" logits are like those of a trained model: the gold token, which is also the sources' first entry, has 0.8 of the
    mass.
    """
    N, D, V, B, _, S, K = ALL_SHAPES[shape]
    g = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=g, device=DEVICE)

    def integers(below, *size):
        return torch.randint(below, size, generator=g, device=DEVICE)

    weight = draw(V, D) / D**0.5
    labels = integers(V, N)
    hidden = draw(N, D)
    if logits == "peaked":
        hidden += (math.log(V) + 2) * F.normalize(weight[labels], dim=1)
    # No id occurs twice in a row, because the baselines do not merge equal ids.
    step = V // K
    offsets = torch.arange(K, device=DEVICE) * step + integers(step, S, N, K)
    offsets[:, :, 0] = 0
    entries = (4 * draw(S, N, K)).sort(dim=-1, descending=True).values
    return {
        "hidden": hidden.to(DTYPE).requires_grad_(),
        "weight": weight.to(DTYPE).requires_grad_(),
        "labels": labels,
        "source_ids": ((labels[:, None] + offsets) % V).int(),
        "source_logprobs": entries.log_softmax(-1) - 0.05,
        "source_ce": torch.rand(S, B, generator=g, device=DEVICE),
        "cu_seqlens": torch.linspace(0, N, B + 1, device=DEVICE).int(),
        "tail": TAIL,
    }


@functools.lru_cache(maxsize=1)
def make_teacher(shape: str, logits: str) -> dict[str, Tensor]:
    """A dense teacher for the rows of `make_case`: hidden states (N, D) and a head (V, D) of its own, as sure as the student."""
    N, D, V, *_ = ALL_SHAPES[shape]
    g = torch.Generator(DEVICE).manual_seed(1)
    hidden, weight = (torch.randn(rows, D, generator=g, device=DEVICE) for rows in (N, V))
    weight /= D**0.5
    if logits == "peaked":
        labels = make_case(shape, logits)["labels"]
        hidden += (math.log(V) + 2) * F.normalize(weight[labels], dim=1)
    return {"teacher_hidden": hidden.to(DTYPE), "teacher_weight": weight.to(DTYPE)}


def first_rows(case: dict[str, Any], rows: int) -> dict[str, Any]:
    """The first `rows` rows as a case of its own, whose gradients are separate from those of the whole."""
    part = {name: value.detach() if isinstance(value, Tensor) else value for name, value in case.items()}
    part |= {name: part[name][:rows] for name in ("hidden", "labels", "teacher_hidden") if name in part}
    part |= {name: part[name][:, :rows] for name in ("source_ids", "source_logprobs")}
    part["cu_seqlens"] = part["cu_seqlens"].clamp(max=rows)
    return part | {name: part[name].clone().requires_grad_() for name in ("hidden", "weight")}
