"""Merges models on disk, parameter by parameter."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from profuser.alignment.vocab_map import same_tokens
from profuser.errors import ConfigError, DataError, first_line
from profuser.merge import methods
from profuser.merge.settings import NORMALIZED, WITH_BASE, MergedModel, MergeSettings
from profuser.merge.weights import Slot, StoredWeights, WeightsWriter
from profuser.models.load import existing, load_tokenizer, read_config
from profuser.progress import Progress
from profuser.recipe.schema import SourceConfig
from profuser.text.token_bytes import TokenBytes

LAYER = re.compile(r"\.(\d+)\.")
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


def merge(settings: MergeSettings, output: Path) -> None:
    """Merges models and writes the result, a Hugging Face directory with the tokenizer of the base or of the first model.

    Raises:
        ConfigError: the models cannot be merged with each other, or `output` holds something already.
        DataError: a model cannot be read.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output must be a new or empty directory, got {output}; name another")
    names = [*([settings.base] if settings.base is not None else []), *(model.model for model in settings.models)]
    architecture, candidates = open_models(names)
    first, others = candidates[0], candidates[settings.base is not None :]
    if settings.method in WITH_BASE:
        check_ancestor(first, others, architecture)
    stored = [name for name in architecture.shapes if name in first.weights and name not in architecture.aliases]
    first_dtype = first.weights.get(stored[0]).dtype
    dtype = first_dtype if settings.dtype is None else getattr(torch, settings.dtype)
    slots = [Slot(name, dtype, architecture.shapes[name]) for name in stored]

    # The result is made beside its place, so that a directory with the name of the output is always whole.
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        with Progress("merge", len(slots), "parameters") as bar:

            def merged() -> Iterator[Tensor]:
                for number, slot in enumerate(slots):
                    yield merged_tensor(settings, architecture, first, others, slot.name, number).to(dtype)
                    bar.update(1)

            WeightsWriter(part, slots).write(merged())
        write_rest(part, first, dtype, settings)
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def merged_tensor(
    settings: MergeSettings,
    architecture: Architecture,
    first: Candidate,
    others: list[Candidate],
    name: str,
    number: int,
) -> Tensor:
    """One parameter of the result."""
    base = first.weights.get(name)
    if not base.is_floating_point():
        return base
    place = place_of(name, first.config)

    def of(candidate: Candidate) -> Tensor:
        tensor = candidate.weights.get(name)
        if name in architecture.tables and candidate.rows is not None:
            known = torch.from_numpy(candidate.rows >= 0)
            tensor = torch.where(
                known[:, None], tensor[torch.from_numpy(np.maximum(candidate.rows, 0))], base.to(tensor.dtype)
            )
        return tensor

    def of_models(key: str, default: float) -> list[float]:
        return [settings.value(key, name, place, model, default) for model in settings.models]

    def shared(key: str, default):
        return settings.value(key, name, place, None, default)

    tensors = (of(candidate) for candidate in others)
    normalize = shared("normalize", settings.method in NORMALIZED)
    scale = shared("lambda", 1.0)
    weights, densities = of_models("weight", 1.0), of_models("density", 1.0)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    match settings.method:
        case "linear":
            return methods.linear(tensors, weights, normalize=normalize)
        case "slerp":
            return methods.slerp(base, next(tensors), shared("t", 0.5))
        case "task_arithmetic":
            return methods.task_arithmetic(base, tensors, weights, scale=scale, normalize=normalize)
        case "ties":
            return methods.ties(base, tensors, weights, densities, scale=scale, normalize=normalize)
        case "dare_linear":
            return methods.dare_linear(base, tensors, weights, densities, generator, scale=scale, normalize=normalize)
        case "dare_ties":
            return methods.dare_ties(base, tensors, weights, densities, generator, scale=scale, normalize=normalize)
    return methods.widen(base, list(tensors), by_row=name == architecture.embedding)


def place_of(name: str, config: PreTrainedConfig) -> float:
    """Where a parameter's layer stands, from 0 to 1; 0 outside of the layers."""
    found = LAYER.search(name)
    last = getattr(config.get_text_config(), "num_hidden_layers", 1) - 1
    if found is None:
        return 0.0
    return int(found[1]) / last if last > 0 else 1.0


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
    """Raises DataError if a model's files lack a parameter, or hold one with another shape than its config says."""
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


def write_rest(folder: Path, first: Candidate, dtype: torch.dtype, settings: MergeSettings) -> None:
    """Writes all but the weights: configuration, tokenizer, and how the merge was made."""
    for path in first.folder.iterdir():
        is_weights = path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "merge.json").write_text(json.dumps(asdict(settings), indent=1) + "\n", encoding="utf-8")
    models = [*([settings.base] if settings.base else []), *(model.model for model in settings.models)]
    lines = "\n".join(f"- `{model}`" for model in models)
    (folder / "README.md").write_text(
        f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [profuser, merge]\n---\n"
        f"# A merge by {settings.method}\n\nThe weights of these models were merged with profuser; `merge.json` has the settings:\n\n"
        f"{lines}\n\n"
        "Their licences apply to this model.\n",
        encoding="utf-8",
    )


def settings_of(
    method: str,
    models: list[str],
    base: str | None,
    weights: list[float] | None,
    densities: list[float] | None,
    shared: dict,
    dtype: str | None,
    seed: int,
) -> MergeSettings:
    """The settings of a command line. A list has one number for every model, or one for all."""
    own: list[dict] = [{} for _ in models]
    for key, numbers in (("weight", weights), ("density", densities)):
        if numbers is None:
            continue
        if len(numbers) not in (1, len(models)):
            raise ConfigError(
                f"--{key} must have one number, or one for each of the {len(models)} models, got {len(numbers)}"
            )
        for n in range(len(models)):
            own[n][key] = numbers[n if len(numbers) > 1 else 0]
    merged = [MergedModel(model=model, parameters=parameters) for model, parameters in zip(models, own)]
    return MergeSettings(method=method, models=merged, base=base, parameters=shared, dtype=dtype, seed=seed)
