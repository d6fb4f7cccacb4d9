"""A model that is an adapter of peft's over a base, in two directories: the adapter is merged into the base's weights when it is loaded.

The adapter's directory has adapter_config.json, which names the base, and no config.json. A tokenizer in it takes the place of the base's.
"""

from __future__ import annotations

import hashlib
import importlib.util
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from profuser.errors import DataError, first_line, in_short, is_lack_of_memory
from profuser.models.fingerprint import fingerprint
from profuser.models.weights import opened
from profuser.recipe.places import is_path, resolve
from profuser.recipe.schema import SourceConfig
from profuser.typed import read_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def adapter_folder(source: SourceConfig) -> Path | None:
    """Returns the directory of the adapter that a source is; None where it is a whole model."""
    folder = Path(resolve(source.model))
    return folder if (folder / CONFIG).is_file() and not (folder / "config.json").exists() else None


def base_of(source: SourceConfig) -> SourceConfig | None:
    """Returns the model over which a source is an adapter; None where it is a whole model.

    Raises:
        DataError: adapter_config.json cannot be read or names no base, the base is not there or is an adapter itself, or a base is
            given for a whole model.
    """
    folder = adapter_folder(source)
    if folder is None:
        if source.base is not None:
            raise DataError(
                f"{source.name}: base must go with an adapter, a directory with {CONFIG} and without config.json, {source.model} is "
                "none; take it out"
            )
        return None
    known = read_json(folder / CONFIG, fix="copy or download the adapter again")
    named = known.get("base_model_name_or_path") if isinstance(known, dict) else None
    base = source.base or named
    if not isinstance(base, str) or not base:
        raise DataError(
            f"{source.name}: an adapter must have a base, {folder / CONFIG} names {in_short(named)}; give it as `base` beside `model`"
        )
    if is_path(base) and not Path(resolve(base)).exists():
        raise DataError(
            f"{source.name}: the adapter {source.model} must have its base, {base} is not there; give its place as `base` beside `model`"
        )
    revision = None if source.base or is_path(base) else known.get("revision")
    found = replace(source, model=base, base=None, revision=revision)
    if adapter_folder(found) is not None:
        raise DataError(
            f"{source.name}: an adapter's base must be a whole model, {base} is an adapter; merge it into its own base, and give that"
        )
    return found


def model_fingerprint(source: SourceConfig) -> str:
    """Returns a short hash of a source's files: of an adapter, those of the adapter and of its base."""
    own, base = fingerprint(source.model), base_of(source)
    if base is None:
        return own
    return hashlib.sha256(f"{own} {fingerprint(base.model)} {base.revision}".encode()).hexdigest()[:16]


def check_adapter_files(name: str, folder: Path) -> None:
    """Finds out, without loading anything, whether an adapter can be loaded.

    Raises:
        DataError: peft is missing, or the weights are missing or damaged.
    """
    if importlib.util.find_spec("peft") is None:
        raise DataError(
            f"{name}: the adapter {folder} needs the package peft, which is not installed; run `pip install 'profuser[lora]'`"
        )
    if not (folder / WEIGHTS).is_file():
        raise DataError(
            f"{name}: an adapter must have its weights, {folder} lacks {WEIGHTS}; copy or download it again"
        )
    with opened(name, folder / WEIGHTS, "numpy"):
        pass


def adapter_shapes(name: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the weights that an adapter has, by their names in the base where these stand for one of its own."""
    with opened(name, folder / WEIGHTS, "numpy") as weights:
        names = weights.keys()
        return {key.removeprefix("base_model.model."): tuple(weights.get_slice(key).get_shape()) for key in names}


def merged(name: str, folder: Path, model: PreTrainedModel) -> PreTrainedModel:
    """Returns a base with an adapter merged into its weights.

    Raises:
        DataError: the adapter does not fit the base, its weights are not those that its configuration asks for, or it is of a kind that
            cannot be merged.
    """
    check_adapter_files(name, folder)
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft warns of a base in another place, and of adapted embeddings
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            dtype, wrapped = model.dtype, cast("Any", peft.get_peft_model(model, config))
            expected = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
            weights = peft.load_peft_weights(str(folder), device="cpu")
            lacking = sorted(expected - set(weights))
            over = sorted(peft.set_peft_model_state_dict(wrapped, weights).unexpected_keys)
            if not lacking and not over:
                return wrapped.merge_and_unload(safe_merge=True).to(dtype).requires_grad_()  # peft has frozen it
        fault = f"it lacks {lacking[0]}" if lacking else f"there is no place for {over[0]}"
    except Exception as error:  # peft and torch each raise their own kinds for what does not fit
        if is_lack_of_memory(error):
            raise
        fault = f"{type(error).__name__}: {first_line(error)}"
    raise DataError(
        f"{name}: an adapter must fit its base and be one that can be merged, {folder} does not ({fault}); give the base that it was "
        "trained on as `base`, or merge it yourself and give the merged model"
    )
