"""The recipe's group `adapter`: what is trained in place of the target's weights. schema.py says what the texts under the fields are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from profuser.errors import ConfigError
from profuser.recipe.checks import check_positive

ALL_LINEAR = "all-linear"


@dataclass(kw_only=True)
class AdapterConfig:
    """A LoRA adapter, which is trained in place of the target's weights (needs the package peft, and bitsandbytes for quantize).

    The fused model is written with the adapter merged into it, and the adapter alone into the run's folder `adapter`.
    """

    rank: int = 16
    """The rank of the matrices A and B."""
    alpha: float = 32.0
    """The change of a layer is BA times alpha / rank."""
    dropout: float = 0.0
    """The share of a layer's inputs that is dropped at random before A."""
    quantize: Literal["nf4"] | None = None
    """How the frozen weights are held: nf4 takes 4 bits for each weight of a linear layer (QLoRA), null keeps them as they are. The
    adapter is merged into the weights as they were before that."""
    target_modules: str | list[str] = ALL_LINEAR
    """The last parts of the names of the layers that are adapted, such as [q_proj, v_proj]; all-linear means all but the head."""

    def __post_init__(self) -> None:
        check_positive("adapter", self, "rank", "alpha")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"adapter.dropout must be in [0, 1), got {self.dropout}; 0 drops nothing")
        if isinstance(self.target_modules, str) and self.target_modules != ALL_LINEAR:
            raise ConfigError(
                f"adapter.target_modules must be a list of names or {ALL_LINEAR}, got {self.target_modules!r}; put it in brackets"
            )
        if not self.target_modules:
            raise ConfigError(f"adapter.target_modules must have a name, got []; {ALL_LINEAR} takes all layers")
