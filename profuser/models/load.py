"""Loads models, tokenizers and reward models. Whatever is wrong with their files is reported as one clear error."""

from __future__ import annotations

import contextlib
import datetime
import importlib.util
import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from profuser.errors import DataError, first_line
from profuser.recipe.places import is_path, resolve
from profuser.recipe.schema import SourceConfig
from profuser.text.chat import ChatFormat


def load_tokenizer(source: SourceConfig) -> PreTrainedTokenizerBase:
    """Loads a source's tokenizer, and gives it the recipe's chat template where there is one.

    Raises:
        DataError: no tokenizer can be loaded, or the file of the chat template is missing.
    """
    location, options = weights_of(source)
    if (Path(location) / "tokenizer.json").exists():
        options.pop("gguf_file", None)  # the original tokenizer, which lies beside the GGUF file, is preferred
    try:
        tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(location, **options))
    except Exception as error:  # transformers and tokenizers each raise their own kinds for a broken file
        raise DataError(
            f"{source.name}: no tokenizer could be loaded from {location} ({first_line(error)}); give a directory with "
            "a tokenizer.json, or the id of a Hub model that is downloaded"
        ) from error
    if source.chat_template is not None:
        template = Path(source.chat_template)
        is_file = source.chat_template.lower().endswith((".jinja", ".jinja2"))
        if is_file and not template.is_file():
            raise DataError(
                f"{source.name}: chat_template must be a template or an existing .jinja file, got {template}"
            )
        tokenizer.chat_template = template.read_text() if is_file else source.chat_template
    return tokenizer


def load_model(source: SourceConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Loads a source's model, in evaluation mode.

    Raises:
        DataError: the directory is missing or does not hold a loadable causal language model.
    """
    location, options = weights_of(source)
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
        # transformers shows a progress bar while it reads a GGUF file. With disable=None it appears on a terminal only.
        modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=None, leave=False)  # pyrefly: ignore[bad-assignment]
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(location, **options, dtype=dtype, output_loading_info=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds for a broken file
        if "gguf_file" in options:
            fix = "transformers must know the architecture of a GGUF file: give the model's safetensors instead"
        else:
            fix = "copy or download it again"
        raise DataError(
            f"{source.name}: no causal language model could be loaded from {location} ({first_line(error)}); {fix}"
        ) from error
    check_loaded(source.name, location, loaded)
    return model.to(device).eval()


def check_loaded(name: str, location: str, loaded: dict[str, Any]) -> None:
    """Raises DataError where transformers would make up weights that the files do not hold."""
    if absent := sorted(loaded["missing_keys"]):
        raise DataError(
            f"{name}: {location} must hold every weight of its model, {len(absent)} are missing ({absent[0]}); copy or "
            "download it again, or fix its config.json"
        )


def stored_dtype(source: SourceConfig) -> torch.dtype:
    """Returns the dtype in which a model's weights are stored, or fp32 where its config does not say."""
    location, options = weights_of(source)
    return getattr(AutoConfig.from_pretrained(location, **options), "dtype", None) or torch.float32


def load_reward_model(
    name: str, location: str, trust_remote_code: bool, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a judge's model, in evaluation mode, and its tokenizer.

    Raises:
        DataError: the files are missing or broken, or the model has another number of outputs than one.
    """
    path = existing(location, name)
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            path, trust_remote_code=trust_remote_code, dtype=torch.float32, output_loading_info=True
        )
        loaded_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = cast("PreTrainedTokenizerBase", loaded_tokenizer)
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds, as in load_model
        raise DataError(
            f"judge {name}: no reward model could be loaded from {path} ({first_line(error)}); copy or download it again, or "
            "name another"
        ) from error
    check_loaded(f"judge {name}", path, loaded)
    if model.config.num_labels != 1:
        raise DataError(
            f"judge {name}: a reward model must have 1 output, got {model.config.num_labels}; use another model"
        )
    return model.to(device).eval(), tokenizer


def chat_format(source: SourceConfig, *, date: datetime.date | None = None) -> ChatFormat:
    """Returns a source's chat format. Its end-of-turn tokens are the tokenizer's and those of the generation config.

    `date` is what its chat template gets; None means today.
    """
    tokenizer = load_tokenizer(source)
    ends = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # not every model has a generation config
        revision = source.revision or "main"
        eos = GenerationConfig.from_pretrained(weights_of(source)[0], revision=revision).eos_token_id
        ends |= {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
    return ChatFormat(tokenizer, end_ids=sorted(ends - {None}), date=date)


def existing(location: str, name: str) -> str:
    """Returns the path or Hub id of a model. `name` is the model's name in the recipe, for the error message.

    Raises:
        DataError: the location is a local path or a `demo:NAME`, and there is nothing.
    """
    path = resolve(location)
    if location.startswith("demo:") and not Path(path).exists():
        bundled = sorted(p.name for p in Path(resolve("demo:guardian")).parent.iterdir() if p.is_dir())
        raise DataError(f"{name}: a bundled model must be one of {', '.join(bundled)}, got {location}; fix the name")
    if is_path(location) and not Path(path).exists():
        raise DataError(
            f"{name}: model must be an existing directory or GGUF file, got {location} (no such place); fix the path"
        )
    return path


def weights_of(source: SourceConfig) -> tuple[str, dict[str, Any]]:
    """Returns the location and the options that transformers' loaders take for a source.

    A model may also be a GGUF file, or a directory that holds a GGUF file and no config.json; transformers reads these, too.

    Raises:
        DataError: the directory does not exist, or it holds several GGUF files or a part of one; the `gguf` package is
            missing; a revision is given for a local model.
    """
    location = existing(source.model, source.name)
    if source.revision is not None and Path(location).exists():
        raise DataError(
            f"{source.name}: a revision must be of a Hub model, got {source.revision} for the local {location}; take it out"
        )
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    file = gguf_file(Path(location), source.name)
    if file is None:
        return location, options
    if importlib.util.find_spec("gguf") is None:
        raise DataError(
            f"{source.name}: reading {file} needs the gguf package, it is not installed; run `pip install gguf`"
        )
    return str(file.parent), options | {"gguf_file": file.name}


def gguf_file(path: Path, name: str) -> Path | None:
    """Returns the GGUF file of a model at `path`, or None for a model in any other form. `name` is for the error message."""
    if path.is_file() and path.suffix.lower() == ".gguf":
        found = [path]
    elif path.is_dir() and not (path / "config.json").exists():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() == ".gguf")
    else:
        return None
    if parts := [f for f in found if re.search(r"-\d{5}-of-\d{5}$", f.stem)]:
        merged = re.sub(r"-\d{5}-of-\d{5}$", "", parts[0].stem)
        raise DataError(
            f"{name}: a GGUF model must be one file, {parts[0]} is a part of one; merge them with "
            f"`llama-gguf-split --merge {parts[0]} {parts[0].with_name(merged)}.gguf`"
        )
    if len(found) > 1:
        raise DataError(
            f"{name}: a directory must hold one GGUF file, {path} holds {', '.join(f.name for f in found)}; set model to one "
            f"of them, for instance {found[0]}"
        )
    return found[0] if found else None


def runtime_dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the dtype of a recipe's name for it; "auto" means bfloat16 on CUDA and float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def default_device() -> torch.device:
    """Returns the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_vocabulary(name: str, chat: ChatFormat, head: torch.Tensor) -> None:
    """Raises DataError if a token of text or an end of turn has an id that the head (V, D) has no row for.

    A control token that is never used may have such an id.
    """
    last = max([i for i, piece in enumerate(chat.token_bytes.pieces) if piece is not None] + list(chat.end_ids))
    if last >= len(head):
        raise DataError(
            f"{name}: a model must have an embedding for every token, its tokenizer has the id {last} and its head only "
            f"{len(head)} rows; use the tokenizer that came with it"
        )
