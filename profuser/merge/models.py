"""Opens the models of a merge, and checks that they can be merged: one architecture, one vocabulary, one ancestor."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from profuser.alignment.vocab_map import same_tokens
from profuser.errors import ConfigError, DataError, first_line
from profuser.merge.blocks import Blocks
from profuser.merge.methods import cosine
from profuser.merge.weights import StoredWeights
from profuser.models.load import existing, load_tokenizer, read_config
from profuser.models.merged_adapter import adapter_folder
from profuser.models.token_ids import check_token_ids
from profuser.models.weights import HARMLESS, has_no_place
from profuser.recipe.schema import SourceConfig
from profuser.text.token_bytes import Spelling, TokenBytes
from profuser.train.checkpoint import checkpoints

ENOUGH_SHARED = 0.9
"""A model must have at least this share of the base's tokens."""
UNRELATED = 0.2
"""A base whose weights have a lower cosine with a model's cannot be its ancestor: trained ones keep above 0.9."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What a tokenizer is loaded from, if there is a tokenizer.json."""
MODEL_FILES = (
    *("config.json", "generation_config.json", *TOKENIZER_FILES, "vocab.*", "merges.txt", "*.model", "tekken.json"),
    *("*.jinja", "chat_template.json", "*processor_config.json", "LICENSE*", "NOTICE*"),
)
"""What belongs to a model beside its weights, as patterns: its configuration, the files of any tokenizer, its chat templates, how
pictures and sound are prepared, and its licence. What others keep in its directory, such as the records of a run, is not named."""
FUSE = "fuse them instead: `python -m profuser.train` with a recipe that names them as sources"


@dataclass
class Candidate:
    """A model that takes part.

    rows: for every token of the base which token of the model is the same one, -1 for none; None if all have the same ids.
    """

    name: str
    folder: Path
    config: PreTrainedConfig
    weights: StoredWeights
    rows: Tensor | None = None

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(SourceConfig(name=self.name, model=self.name))

    @functools.cached_property
    def tokens(self) -> TokenBytes:
        return TokenBytes(self.tokenizer)


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
        check_whole(name, Path(location))
        config = read_config(name, location, {})
        check_token_ids(name, location, config)
        folder = Path(location)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(location, allow_patterns=["*.safetensors", "*.json"]))
            except Exception as error:  # huggingface_hub raises many kinds
                raise DataError(
                    f"{name}: its weights could not be downloaded ({first_line(error)}); copy them here"
                ) from None
        found = architecture_of(name, config)
        weights = StoredWeights(name, folder, found.aliases)
        found = untied(found, weights)
        architecture = architecture or found
        candidate = Candidate(name, folder, config, weights)
        if candidates:
            check_mergeable(candidates[0], candidate, architecture, found)
        else:
            _ = candidate.tokenizer  # the result gets it, so it must be one that can be loaded
        candidates.append(candidate)
        check_stored(candidate, found)
    assert architecture is not None
    return architecture, candidates


def check_whole(name: str, folder: Path) -> None:
    """Raises ConfigError for an adapter of peft and for a checkpoint of a run, which hold no model that could be merged."""
    if adapter_folder(SourceConfig(name=name, model=name)) is not None:
        run = folder.resolve().parent
        fix = "merge it into its base by peft's merge_and_unload, save that, and name it"
        if (run / "run.json").exists():
            fix = f"name its run, {run}, which holds the model into which it was merged"
        raise ConfigError(f"models must be whole to be merged, {name} is an adapter of peft; {fix}")
    if not (folder / "config.json").exists() and folder in checkpoints(folder.parent):
        raise ConfigError(
            f"models must be whole to be merged, {name} is a checkpoint; name its run, {folder.resolve().parents[1]}, which holds the "
            "model when its training is complete"
        )


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


def untied(architecture: Architecture, weights: StoredWeights) -> Architecture:
    """The same without the ties of parameters that have values of their own in a model's files. transformers does not tie them either."""
    own = {
        name
        for name, stored in architecture.aliases.items()
        if name in weights.names and stored in weights.names and not torch.equal(weights.get(name), weights.get(stored))
    }
    return replace(
        architecture,
        aliases={name: stored for name, stored in architecture.aliases.items() if name not in own},
        tables=architecture.tables | {name for name in own if architecture.aliases[name] in architecture.tables},
    )


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
    if own := sorted(expected.aliases.keys() - found.aliases.keys()):
        raise ConfigError(
            f"models must have tied embeddings where the first's are tied, {other.name} has a {own[0]} of its own, which would be lost, "
            f"and {first.name} has not; name {other.name} first where there is no base, or {FUSE}"
        )
    same = same_tokenizer_files(first.folder, other.folder) or (
        same_tokens(first.tokens, other.tokens) and first.tokens.specials == other.tokens.specials
    )
    if not same:
        rows, rows_other = (model.shapes[model.embedding][0] for model in (expected, found))
        other.rows = rows_of(first, rows, other, rows_other)
    for name in {**expected.shapes, **found.shapes}:
        ours, theirs = expected.shapes.get(name), found.shapes.get(name)
        if name in expected.tables and not same and ours and theirs and ours[1:] == theirs[1:]:
            continue
        if ours != theirs and name not in {*expected.aliases, *found.aliases}:
            raise ConfigError(
                f"models must have one architecture to be merged, {name} is {ours or 'missing'} in {first.name} and "
                f"{theirs or 'missing'} in {other.name}; {FUSE}"
            )


def same_tokenizer_files(first: Path, other: Path) -> bool:
    """Whether two models have the very same tokenizer, which then need not be taken apart."""

    def contents(folder: Path) -> list[bytes | None]:
        return [path.read_bytes() if (path := folder / name).is_file() else None for name in TOKENIZER_FILES]

    ours = contents(first)
    return ours[0] is not None and ours == contents(other)


def rows_of(first: Candidate, rows: int, other: Candidate, rows_other: int) -> Tensor:
    """For each of the base's rows the other's row of the same spelling or the same control token, -1 where there is none.

    rows, rows_other: how many rows the models' embeddings have. A token may have none, as one that was added later.
    """

    def keys(candidate: Candidate, rows: int) -> list[Spelling | str | None]:
        tokens = candidate.tokens
        return [spelling or tokens.specials.get(i) for i, spelling in enumerate(tokens.spellings[:rows])]

    theirs = {key: i for i, key in enumerate(keys(other, rows_other)) if key is not None}
    ours = keys(first, rows)
    found = torch.full((rows,), -1)
    found[: len(ours)] = torch.tensor([-1 if key is None else theirs.get(key, -1) for key in ours])
    used = [i for i, key in enumerate(ours) if key is not None]
    share = float((found[used] >= 0).double().mean())
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
            alike = cosine(blocks_of(architecture, [base, other], name))
            if abs(alike) < UNRELATED:
                raise ConfigError(
                    f"--base must be the model that {other.name} was trained from, {base.name} has nothing in common with it (the "
                    f"cosine of {name} is {alike:.2f}); name its own base, or use --method linear or slerp"
                )


def blocks_of(architecture: Architecture, candidates: Sequence[Candidate], name: str) -> Blocks:
    """A parameter of all models. Where its rows are tokens, a token's rows of all models stand beside each other."""
    is_table = name in architecture.tables
    rows = [candidate.rows if is_table else None for candidate in candidates]
    return Blocks([candidate.weights.get(name) for candidate in candidates], rows)
