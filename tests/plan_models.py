"""The models of which the tests of the plan know what they have."""

from __future__ import annotations

from conftest import ROOT
from transformers import AutoConfig

from profuser.plan.architecture import Architecture, open_architecture
from profuser.recipe.schema import SourceConfig

PAPER = str(ROOT / "profuser/recipes/paper-7b.yaml")
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 101,
}


def small(model_type: str, **sizes) -> Architecture:
    return Architecture(model_type, AutoConfig.for_model(model_type, **(SMALL | sizes)), "generates", True, False)


def demo(name: str) -> Architecture:
    return open_architecture(SourceConfig(name=name, model=f"demo:{name}"))
