"""Opens and loads reward models, which judge responses: whole models, or adapters over a base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from profuser.errors import DataError
from profuser.models.load import check_kind, check_places, existing, load, load_tokenizer, place_of_files, read_config
from profuser.models.merged_adapter import adapter_folder, adapter_shapes, base_of, check_adapter_files, merged
from profuser.models.weights import check_weights
from profuser.recipe.schema import SourceConfig

HEAD = re.compile(r"(score|classifier)\.weight$")
"""The weights of a reward model's last layer, which has a row per output."""


@dataclass(frozen=True, slots=True)
class RewardFiles:
    """Where the parts of a judge's model lie.

    location, options: what transformers' loaders take, of an adapter those of its base. adapter: its directory, None for a whole model.
    brought: the weights that an adapter has whole, such as the score head, by their names in the base; None for a whole model.
    """

    location: str
    options: dict[str, Any]
    adapter: Path | None = None
    brought: frozenset[str] | None = None


def reward_files(judge: SourceConfig) -> RewardFiles:
    """Finds the parts of a judge's model.

    Raises:
        DataError: it or its base is not there, or an adapter cannot be loaded or has another number of outputs than one.
    """
    folder, base = adapter_folder(judge), base_of(judge)
    options: dict[str, Any] = {"trust_remote_code": judge.trust_remote_code}
    if folder is None or base is None:
        return RewardFiles(existing(judge.model, judge.name.removeprefix("judge ")), options)
    check_adapter_files(judge.name, folder)
    shapes = adapter_shapes(judge.name, folder)
    for key, shape in shapes.items():
        if HEAD.match(key) and shape[0] != 1:
            raise DataError(
                f"{judge.name}: a reward model must have 1 output, {folder} has {shape[0]} ({key}); use another model"
            )
    # The configuration of a language model, which most bases are, does not say that there is one output.
    options |= {"revision": base.revision, "num_labels": 1}
    return RewardFiles(existing(base.model, base.name), options, folder, frozenset(shapes))


def open_reward_model(name: str, location: str, trust_remote_code: bool, base: str | None = None) -> PreTrainedConfig:
    """Opens a judge's model without loading it, and returns its configuration.

    Args:
        base: the base of an adapter; None takes the one that the adapter names.
    Raises:
        DataError: the configuration cannot be read, is of no reward model, or has another number of outputs than one; a model that is
            here, or cannot be fetched, has no weights, or damaged ones; an adapter and its base have no score head. And what
            `reward_files` raises.
    """
    judge = SourceConfig(name=f"judge {name}", model=location, base=base, trust_remote_code=trust_remote_code)
    model, files = judge.name, reward_files(judge)
    path = files.location
    config = read_config(model, path, files.options)
    check_kind(model, path, config, "AutoModelForSequenceClassification", MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    check_outputs(name, config)
    place = place_of_files(model, path, files.options.get("revision"))
    check_weights(model, place)
    check_places(AutoModelForSequenceClassification, model, str(place), config, files.options, files.brought)
    return config


def check_outputs(name: str, config: PreTrainedConfig) -> None:
    """Raises DataError unless a judge's model has one output, the score."""
    if config.num_labels != 1:
        raise DataError(f"judge {name}: a reward model must have 1 output, got {config.num_labels}; use another model")


def load_reward_model(
    name: str,
    location: str,
    trust_remote_code: bool,
    device: torch.device | str = "cpu",
    base: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a judge's model, in evaluation mode, and its tokenizer. An adapter is merged into its base.

    Args:
        base: as in `open_reward_model`.
    Raises:
        DataError: the files are missing or broken, the model has another number of outputs than one, or an adapter does not fit its
            base.
    """
    judge = SourceConfig(name=f"judge {name}", model=location, base=base, trust_remote_code=trust_remote_code)
    files = reward_files(judge)
    options = {**files.options, "dtype": torch.float32}
    model: Any = load(AutoModelForSequenceClassification, judge.name, files.location, options, files.brought)
    if files.adapter is not None:
        model = merged(judge.name, files.adapter, model)
    tokenizer = load_tokenizer(judge)
    check_outputs(name, model.config)
    return model.to(device).eval(), tokenizer
