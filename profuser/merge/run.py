"""Merges models on disk, parameter by parameter, and each of them block by block."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from profuser.errors import ConfigError, DataError
from profuser.merge import methods
from profuser.merge.blocks import Blocks
from profuser.merge.models import MODEL_FILES, Architecture, Candidate, blocks_of, check_ancestor, open_models
from profuser.merge.settings import DTYPES, NORMALIZED, WITH_BASE, MergeSettings
from profuser.merge.weights import NAMES, Slot, WeightsWriter
from profuser.merge.widen import widen
from profuser.progress import Progress
from profuser.stopping import working
from profuser.store.files import remove_left_over, temporary_beside, writing

LAYER = re.compile(r"\.(\d+)\.")


def merge(settings: MergeSettings, output: Path) -> None:
    """Merges models and writes the result, a Hugging Face directory with the tokenizer of the base or of the first model.

    Raises:
        ConfigError: the models cannot be merged with each other, or `output` holds something already.
        DataError: a model cannot be read.
    """
    place = output.resolve()
    if output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir()))):
        raise ConfigError(f"--output must be a new or empty directory, got {output}; name another")
    if Path.cwd().is_relative_to(place):
        raise ConfigError(f"--output must not be the working directory, got {output}; name another")
    architecture, candidates = open_models(settings.names)
    first, others = candidates[0], candidates[settings.base is not None :]
    if settings.method in WITH_BASE:
        check_ancestor(first, others, architecture)
    check_layers(settings, first.config)
    stored = [name for name in architecture.shapes if name in first.weights and name not in architecture.aliases]
    first_dtype = first.weights.get(stored[0]).dtype
    if settings.dtype is None and first_dtype not in NAMES:
        raise ConfigError(
            f"a merge is written in one of {', '.join(DTYPES)}, {first.name} is stored in {str(first_dtype).removeprefix('torch.')}; "
            "give --dtype"
        )
    dtype = first_dtype if settings.dtype is None else getattr(torch, settings.dtype)
    slots = [Slot(name, dtype, architecture.shapes[name]) for name in stored]

    # The result is made beside its place, so that a directory with the name of the output is always whole.
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_left_over(output)
    part = temporary_beside(output)
    part.mkdir()
    size = sum(slot.size for slot in slots)
    try:
        with writing(output, size), working(), Progress("merge", len(slots), "parameters") as bar:

            def merged() -> Iterator[Tensor]:
                for number, slot in enumerate(slots):
                    blocks = blocks_of(architecture, candidates, slot.name)
                    try:
                        for block in merged_blocks(settings, architecture, blocks, first.config, slot.name, number):
                            rounded = block.to(dtype)
                            check_finite(candidates, slot.name, rounded)
                            yield rounded
                    except ValueError as error:  # the weights add up to 0
                        raise ConfigError(str(error)) from None
                    bar.update(1)

            WeightsWriter(part, slots).write(merged())
            bar.update(len(slots) - bar.done)  # the last one, behind which nothing more is asked for
        write_rest(part, first, dtype, settings)
        if output.exists():
            output.rmdir()
        os.replace(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def merged_blocks(
    settings: MergeSettings,
    architecture: Architecture,
    blocks: Blocks,
    config: PreTrainedConfig,
    name: str,
    number: int,
) -> Iterable[Tensor]:
    """One parameter of the result, block by block. `number` is its place among all parameters."""
    if not blocks.tensors[0].is_floating_point():
        return blocks.tensors[:1]
    place = place_of(name, config)

    def of_models(key: str, default: float) -> list[float]:
        return [settings.value(key, name, place, model, default) for model in settings.models]

    def shared(key: str, default):
        return settings.value(key, name, place, None, default)

    normalize = shared("normalize", settings.method in NORMALIZED)
    scale = shared("lambda", 1.0)
    weights, densities = of_models("weight", 1.0), of_models("density", 1.0)
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
    match settings.method:
        case "linear":
            return methods.linear(blocks, weights, normalize=normalize)
        case "slerp":
            return methods.slerp(blocks, shared("t", 0.5))
        case "task_arithmetic":
            return methods.task_arithmetic(blocks, weights, scale=scale, normalize=normalize)
        case "ties":
            return methods.ties(blocks, weights, densities, scale=scale, normalize=normalize)
        case "dare_linear":
            return methods.dare_linear(blocks, weights, densities, generator, scale=scale, normalize=normalize)
        case "dare_ties":
            return methods.dare_ties(blocks, weights, densities, generator, scale=scale, normalize=normalize)
    return widen(blocks, by_row=name == architecture.embedding)


def check_layers(settings: MergeSettings, config: PreTrainedConfig) -> None:
    """Raises ConfigError where a slice leaves out layers, because all are merged."""
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    for model in settings.models:
        if model.layer_range is not None and model.layer_range != [0, count]:
            raise ConfigError(
                f"layer_range must be all layers, [0, {count}], got {model.layer_range} of {model.model}; layers are not taken out "
                "here, use mergekit's passthrough for that"
            )


def check_finite(models: Iterable[Candidate], name: str, merged: Tensor) -> None:
    """Raises DataError where a block of a parameter of the result is not finite, and says why."""
    if not merged.is_floating_point() or not merged.numel():
        return
    least, most = merged.aminmax()  # several times as fast as isfinite, and NaN where anything is
    if math.isfinite(least) and math.isfinite(most):
        return
    for model in models:
        if not all(bool(block.isfinite().all()) for (block,) in Blocks([model.weights.get(name)], [None])):
            raise DataError(
                f"{model.name}: weights must be finite, got NaN or infinity in {name}; copy or download it again"
            )
    raise DataError(
        f"merged weights must be finite, {name} exceeds {str(merged.dtype).removeprefix('torch.')}; give smaller weights, or --dtype "
        "float32"
    )


def place_of(name: str, config: PreTrainedConfig) -> float:
    """Where a parameter's layer stands, from 0 to 1; 0 outside of the layers."""
    found = LAYER.search(name)
    last = getattr(config.get_text_config(), "num_hidden_layers", 1) - 1
    if found is None:
        return 0.0
    return int(found[1]) / last if last > 0 else 1.0


def write_rest(folder: Path, first: Candidate, dtype: torch.dtype, settings: MergeSettings) -> None:
    """Writes all but the weights: configuration, tokenizer, and how the merge was made."""
    for pattern in (*MODEL_FILES, *first.tokenizer.vocab_files_names.values()):
        for path in filter(Path.is_file, first.folder.glob(pattern)):
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
