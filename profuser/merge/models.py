"""Opens the models of a merge, and checks that they can be merged: one architecture, one vocabulary, one ancestor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from profuser.alignment.vocab_map import same_tokens
from profuser.errors import ConfigError, DataError, first_line
from profuser.merge.weights import StoredWeights
from profuser.models.load import existing, load_tokenizer, read_config
from profuser.models.weights import HARMLESS, has_no_place
from profuser.recipe.schema import SourceConfig
from profuser.text.token_bytes import TokenBytes

ENOUGH_SHARED = 0.9
"""A model must have at least this share of the base's tokens."""
UNRELATED = 0.2
"""A base whose weights have a lower cosine with a model's cannot be its ancestor: trained ones keep above 0.9."""
FUSE = "fuse them instead: `python -m profuser.train` with a recipe that names them as sources"


@dataclass(slots=True)
class Candidate:
    """A model that takes part.

    rows: for every token of the base which token of the model has the same bytes, -1 for none; None if the tokens are the same.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    weights: StoredWeights
    tokens: TokenBytes
    rows: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a model of a configuration consists of.

    shapes: its parameters with their shapes. aliases: those that share the tensor of another one.
    tables: the parameters with a row for every token. embedding: the one of these that is the input's.
    """

    shapes: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    tables: frozenset[str]
    embedding: str


def open_models(names: list[str]) -> tuple[Architecture, list[Candidate]]:
    """Opens all models, the base or first one in front, and checks that they can be merged."""
    candidates: list[Candidate] = []
    architecture: Architecture | None = None
    for name in names:
        location = existing(name, name)
        config = read_config(name, location, {})
        folder = Path(location)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(location, allow_patterns=["*.safetensors", "*.json"]))
            except Exception as error:  # huggingface_hub raises many kinds
                raise DataError(
                    f"{name}: its weights could not be downloaded ({first_line(error)}); copy them here"
                ) from None
        found = architecture_of(name, config)
        architecture = architecture or found
        weights = StoredWeights(name, folder, found.aliases)
        tokens = TokenBytes(load_tokenizer(SourceConfig(name=name, model=name)))
        candidate = Candidate(name, folder, config, weights, tokens)
        if candidates:
            check_mergeable(candidates[0], candidate, architecture, found)
        candidates.append(candidate)
        check_stored(candidate, found)
    assert architecture is not None
    return architecture, candidates


def architecture_of(name: str, config: PreTrainedConfig) -> Architecture:
    """Finds out what a model consists of, without its weights."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers raises its own kinds
        raise DataError(
            f"{name}: no causal language model can be made from its config.json ({first_line(error)}); name another"
        ) from error
    shapes = {key: tuple(value.shape) for key, value in model.state_dict(keep_vars=True).items()}
    by_tensor: dict[int, str] = {}
    aliases = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if (stored := by_tensor.setdefault(id(value), key)) != key:
            aliases[key] = stored
    names = {id(value): key for key, value in reversed(model.state_dict(keep_vars=True).items())}
    embedding = names[id(model.get_input_embeddings().weight)]
    head = model.get_output_embeddings()
    tables = {embedding, *([names[id(head.weight)]] if head is not None else [])}
    return Architecture(shapes, aliases, frozenset(tables), embedding)


def check_stored(candidate: Candidate, architecture: Architecture) -> None:
    """Raises DataError if a model's files lack a parameter, or hold another one or another shape than its config says."""
    if extra := [x for x in candidate.weights.names if x not in architecture.shapes and not HARMLESS.search(x)]:
        raise DataError(has_no_place(candidate.name, str(candidate.folder), sorted(extra), candidate.config))
    for name, shape in architecture.shapes.items():
        if name not in candidate.weights:
            raise DataError(f"{candidate.name}: its files lack the parameter {name}; copy or download it again")
        if candidate.weights.shape(name) != shape:
            raise DataError(
                f"{candidate.name}: the parameter {name} must have the shape {shape} of its config, got "
                f"{candidate.weights.shape(name)}; copy or download it again"
            )


def check_mergeable(first: Candidate, other: Candidate, expected: Architecture, found: Architecture) -> None:
    """Raises ConfigError unless both have one architecture and nearly one vocabulary. Finds out how tokens correspond."""
    same = same_tokens(first.tokens, other.tokens)
    if not same:
        other.rows = rows_of(first, other, expected.shapes[expected.embedding][0])
    for name in {**expected.shapes, **found.shapes}:
        ours, theirs = expected.shapes.get(name), found.shapes.get(name)
        if name in expected.tables and not same and ours and theirs and ours[1:] == theirs[1:]:
            continue
        if ours != theirs and name not in {*expected.aliases, *found.aliases}:
            raise ConfigError(
                f"models must have one architecture to be merged, {name} is {ours or 'missing'} in {first.name} and "
                f"{theirs or 'missing'} in {other.name}; {FUSE}"
            )


def rows_of(first: Candidate, other: Candidate, rows: int) -> np.ndarray:
    """For each of the base's rows the other's row of the same bytes or the same control token, -1 where there is none."""

    def keys(candidate: Candidate) -> list[bytes | str | None]:
        tokens = candidate.tokens
        return [piece if piece else tokens.specials.get(i) for i, piece in enumerate(tokens.pieces)]

    theirs = {key: i for i, key in reversed(list(enumerate(keys(other)))) if key is not None}
    ours = keys(first)[:rows]
    found = np.full(rows, -1, dtype=np.int64)
    found[: len(ours)] = [-1 if key is None else theirs.get(key, -1) for key in ours]
    used = [i for i, key in enumerate(ours) if key is not None]
    share = float((found[used] >= 0).mean())
    if share < ENOUGH_SHARED:
        raise ConfigError(
            f"models must have one vocabulary to be merged, {other.name} has {share:.0%} of the tokens of {first.name}; {FUSE}"
        )
    return found


def check_ancestor(base: Candidate, others: list[Candidate], architecture: Architecture) -> None:
    """Raises ConfigError for a base that has nothing in common with a model, whose task vector would be noise."""
    matrices = [
        name
        for name, shape in architecture.shapes.items()
        if len(shape) == 2 and name not in architecture.tables and name not in architecture.aliases
    ]
    for other in others:
        for name in matrices[len(matrices) // 2 :][:1]:
            a, b = (x.weights.get(name).double().reshape(-1) for x in (base, other))
            cosine = float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-30))
            if abs(cosine) < UNRELATED:
                raise ConfigError(
                    f"--base must be the model that {other.name} was trained from, {base.name} has nothing in common with it (the "
                    f"cosine of {name} is {cosine:.2f}); name its own base, or use --method linear or slerp"
                )


def tensor_beside(base: Tensor, other: Candidate, architecture: Architecture, name: str) -> Tensor:
    """Returns a model's tensor of a parameter, with one row for each of the base's where the rows are tokens.

    A token that the model does not have gets the base's row.
    """
    tensor = other.weights.get(name)
    if name in architecture.tables and other.rows is not None:
        known = torch.from_numpy(other.rows >= 0)
        tensor = torch.where(known[:, None], tensor[torch.from_numpy(np.maximum(other.rows, 0))], base.to(tensor.dtype))
    return tensor
