"""The recipe's group `generation`: how the sources answer, and what a single source may do otherwise."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from profuser.errors import ConfigError
from profuser.recipe.checks import check_not_negative, check_positive

Reasoning = Literal["keep", "strip"]

Engine = Literal["auto", "transformers", "continuous", "vllm", "server"]
WITH_PYTHON: tuple[Engine, ...] = ("auto", "vllm")
"""The engines with which `generation.python` has a meaning."""


@dataclass(kw_only=True)
class GenerationConfig:
    """How the sources answer the training prompts (for the inference mode) and the held-out prompts (for the scores)."""

    engine: Engine = "auto"
    """What lets the models write: transformers in this process, in batches; continuous, which is transformers' continuous batching, where
    the next prompt takes the place of an answer that has ended; vllm in a process of its own; or server, for which each source has
    `server`. auto takes vllm on a GPU if it is installed, and transformers otherwise; it is settled when a store is begun."""
    python: str | None = None
    """The Python in which vllm is installed, such as vllm-env/bin/python; null means the one that runs profuser."""
    responses_per_source: int = 1
    """How many responses each source gives to a training prompt. More than one needs a temperature above 0."""
    max_new_tokens: int = 512
    """The longest response in tokens. A response that is not finished by then does not take part in the vote."""
    temperature: float = 0.0
    """The temperature of sampling; 0 means greedy decoding."""
    top_p: float = 1.0
    """Only the most probable tokens are sampled from, until they hold this share of the probability; 1 keeps all tokens."""
    batch_size: int = 16
    """How many prompts are answered at a time. It counts for transformers, and for continuous on a CPU."""
    reasoning: Reasoning = "keep"
    """Whether the reasoning that a model writes before its answer (a think block, another channel) is a part of its response."""

    def __post_init__(self) -> None:
        check_positive("generation", self, "responses_per_source")
        check_sampling("generation", self)
        if self.python is not None and self.engine not in WITH_PYTHON:
            raise ConfigError(
                f"generation.python must go with generation.engine vllm, got engine {self.engine}; take it out"
            )


@dataclass(kw_only=True)
class SourceGenerationConfig:
    """What one source does otherwise than the recipe's `generation` says. null takes what is said there."""

    engine: Engine | None = None
    """What lets this source write."""
    max_new_tokens: int | None = None
    """Its longest response in tokens."""
    temperature: float | None = None
    """Its temperature of sampling; 0 means greedy decoding."""
    top_p: float | None = None
    """The share of the probability that its most probable tokens hold, from which alone is sampled."""
    batch_size: int | None = None
    """How many prompts it answers at a time."""

    def check(self, group: str) -> None:
        """Raises what `check_sampling` raises. `group` is the place of these keys in the recipe."""
        check_sampling(group, self)

    @property
    def said(self) -> dict[str, Any]:
        """What differs from the recipe's `generation`, by its key."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


def check_sampling(group: str, config: GenerationConfig | SourceGenerationConfig) -> None:
    """Raises ConfigError for a length, a batch or a rule of sampling that there is not. What is None passes."""
    check_positive(group, config, "max_new_tokens", "batch_size", "top_p")
    if config.temperature is not None:
        check_not_negative(group, config, "temperature")
    if config.top_p is not None and config.top_p > 1:
        raise ConfigError(f"{group}.top_p must be <= 1, got {config.top_p}; 1 keeps all tokens")
