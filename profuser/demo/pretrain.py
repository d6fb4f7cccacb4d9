"""The demo's three sources: tiny models, trained from random weights to answer problems that are in none of the splits.

Each is strong in one skill and knows a fixed small part of the two others (`World.pretraining`): 60 % of its examples are
from its own skill and 20 % from each of the others. All answer in worked form. They differ in architecture, size,
tokenizer and chat template, as real sources do. Pre-training of a base model is left out on purpose: the loss is on the
response's tokens only.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from profuser.demo.skills import SKILLS, World
from profuser.demo.tokenizers import CHATML, LLAMA2_LINE, MAX_LENGTH, VICUNA_LINE
from profuser.demo.verify import exact_match
from profuser.kernels.common import IGNORE_INDEX
from profuser.models.padding import padded
from profuser.prepare.responses import generate
from profuser.recipe.generation import GenerationConfig
from profuser.text.chat import ChatFormat
from profuser.train.export import save_weights

MAX_NEW_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class SourceSpec:
    """What one source is made of."""

    name: str
    skill: str
    """The skill in which it is strong; empty for a judge."""
    architecture: str
    """`llama` or `gpt_neox`."""
    tokenizer: str
    """`wide` or `narrow`."""
    template: str
    hidden: int
    layers: int
    intermediate: int
    heads: int = 4


SOURCES = (
    SourceSpec(
        name="guardian", skill="safety", architecture="llama", tokenizer="wide", template=CHATML, hidden=128, layers=4, intermediate=256
    ),
    SourceSpec(
        name="scholar", skill="knowledge", architecture="gpt_neox", tokenizer="narrow", template=VICUNA_LINE, hidden=128, layers=4,
        intermediate=512,
    ),
    SourceSpec(
        name="reckoner", skill="reasoning", architecture="llama", tokenizer="narrow", template=LLAMA2_LINE, hidden=112, layers=5,
        intermediate=320,
    ),
)  # fmt: skip
TARGET = "guardian"


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """How a source is trained."""

    steps: int = 700
    batch_size: int = 64
    lr: float = 2e-3
    own_share: float = 0.6
    """The share of examples from the source's own skill. The other skills share the rest equally."""
    seed: int = 0


def config_of(spec: SourceSpec, tokenizer: PreTrainedTokenizerFast, **changes: Any) -> PretrainedConfig:
    """A Llama or GPT-NeoX configuration with the tokenizer's special tokens."""
    kind = {"llama": LlamaConfig, "gpt_neox": GPTNeoXConfig}[spec.architecture]
    return kind(
        vocab_size=len(tokenizer),
        hidden_size=spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        intermediate_size=spec.intermediate,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        **changes,
    )


def batch_of(chat: ChatFormat, pairs: Iterable[tuple[str, str]]) -> dict[str, torch.Tensor]:
    """Pads (prompt, response) conversations on the right, and puts labels on all that follows the generation prompt.

    That is the response and its end of turn. It is also the template's space before the response, where the tokenizer makes
    a token of it: a model that never learnt to write this space could not begin a response with a digit.
    """
    rows = [(chat.encode(prompt, response).input_ids, len(chat.prompt_ids(prompt))) for prompt, response in pairs]
    input_ids, attention_mask = padded([ids for ids, _ in rows], chat.tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (ids, start) in enumerate(rows):
        labels[i, start : len(ids)] = torch.tensor(ids[start:])
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def optimise(
    model: PreTrainedModel,
    loss_of_step: Callable[[int], torch.Tensor],
    *,
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    report: Callable[[str], None] | None = None,
) -> None:
    """Trains with AdamW. The learning rate warms up over 5 % of the steps and then falls to 0 along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)
    warmup = max(1, steps // 20)
    model.train()
    began, running = time.perf_counter(), 0.0
    for step in range(steps):
        progress = (step - warmup) / max(1, steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running += loss.item()
        if report and (step + 1) % 100 == 0:
            report(f"step {step + 1}/{steps} loss {running / 100:.4f} {time.perf_counter() - began:.0f} s")
            running = 0.0
    model.eval()


def pretrain(
    spec: SourceSpec,
    world: World,
    tokenizer: PreTrainedTokenizerFast,
    settings: PretrainSettings,
    report: Callable[[str], None] = print,
) -> PreTrainedModel:
    """Trains one source in fp32 from random weights. The seed fixes both the weights and the examples."""
    torch.manual_seed(settings.seed)
    model = AutoModelForCausalLM.from_config(config_of(spec, tokenizer), dtype=torch.float32)
    rng = random.Random(f"{settings.seed} pretrain {spec.name}")
    samplers = [world.pretraining(skill, spec.name, strong=skill == spec.skill) for skill in SKILLS]
    shares = [settings.own_share if skill == spec.skill else (1 - settings.own_share) / 2 for skill in SKILLS]
    chat = ChatFormat(tokenizer)

    def loss_of_step(_: int) -> torch.Tensor:
        problems = [sampler(rng) for sampler in rng.choices(samplers, shares, k=settings.batch_size)]
        return model(**batch_of(chat, [(p.prompt, p.worked) for p in problems])).loss

    optimise(
        model, loss_of_step, steps=settings.steps, lr=settings.lr, report=lambda line: report(f"{spec.name}: {line}")
    )
    return model


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes a model directory: weights in bf16, configuration, tokenizer, chat template and generation configuration."""
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.update(
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            do_sample=False,
        )
    save_weights(model, folder, torch.bfloat16)
    tokenizer.save_pretrained(folder)


def respond(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """Greedy responses in the order of the prompts. A response that does not end its turn is cut at MAX_NEW_TOKENS."""
    settings = GenerationConfig(max_new_tokens=MAX_NEW_TOKENS, batch_size=128)
    return [
        answers[0].text for answers in generate(model, ChatFormat(tokenizer), prompts, settings, max_length=MAX_LENGTH)
    ]


def accuracies(rows: Sequence[dict], responses: Sequence[str]) -> dict[str, float]:
    """The percentage of right answers for each skill, and the mean of the skills."""
    right: dict[str, list[bool]] = {skill: [] for skill in SKILLS}
    for row, response in zip(rows, responses):
        right[row["skill"]].append(exact_match(row, response))
    table = {skill: 100 * sum(hits) / len(hits) for skill, hits in right.items() if hits}
    return table | {"mean": sum(table.values()) / len(table)}
