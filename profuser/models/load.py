"""Loads models, tokenizers and reward models. Whatever is wrong with their files is reported as one clear error."""

from __future__ import annotations

import copy
import datetime
import functools
import gc
import importlib.util
import re
from collections.abc import Collection, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import constants, try_to_load_from_cache
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from profuser.errors import DataError, first_line, in_short, is_lack_of_memory
from profuser.models.attention import flash_attention
from profuser.models.gguf_header import gguf_tensors
from profuser.models.merged_adapter import adapter_folder, base_of, check_adapter_files, merged
from profuser.models.token_ids import check_token_ids, configuration_file
from profuser.models.weights import AutoModel, check_gguf_blocks, check_weights, loaded_model
from profuser.recipe.places import check_model, resolve
from profuser.recipe.schema import SourceConfig
from profuser.recipe.utf8 import read_utf8
from profuser.text.chat import ChatFormat
from profuser.text.patterns import check_patterns
from profuser.text.template import FIX_IN_RECIPE, FIX_OF_RECIPES_OWN, TEMPLATE_CHARACTERS, ChatTemplate
from profuser.text.token_bytes import MAX_ID
from profuser.typed import parsed

MAX_FILE_BYTES = 1 << 28
"""The largest size of a tokenizer's or configuration's file. The largest in use have 35 MiB."""
MAX_PARTS = 10_000
"""The largest number of layers, experts or labels that a configuration may give."""


def load_tokenizer(source: SourceConfig) -> PreTrainedTokenizerBase:
    """Loads a source's tokenizer, and gives it the recipe's chat template where there is one.

    Raises:
        DataError: no tokenizer can be loaded, one of its patterns takes exponential time, or the file of the chat template is
            missing.
    """
    location, options = weights_of(source)
    folder = adapter_folder(source)
    if folder is not None and any((folder / file).exists() for file in ("tokenizer.json", "tokenizer_config.json")):
        location, options = str(folder), options | {"revision": None}
    if (Path(location) / "tokenizer.json").exists():
        options.pop("gguf_file", None)  # the original tokenizer, which lies beside the GGUF file, is preferred
    try:
        tokenizer = cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(location, **options))
    except Exception as error:  # transformers and tokenizers each raise their own kinds for a broken file
        fix = fix_of(error, "give a directory with a tokenizer.json, or the id of a Hub model that is downloaded")
        reason, fix = tokenizer_trouble(location) or (first_line(error), fix)
        raise DataError(f"{source.name}: no tokenizer could be loaded from {location} ({reason}); {fix}") from error
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        check_patterns(source.name, backend)
    if source.chat_template is not None:
        tokenizer.chat_template = template_text(source.name, source.chat_template)
    return tokenizer


def template_text(name: str, template: str) -> str:
    """Returns the chat template that a recipe gives for the model `name`, be it spelt out or in a file.

    Raises:
        DataError: the file is missing or not UTF-8.
    """
    if not template.lower().endswith((".jinja", ".jinja2")):
        return template
    if not Path(template).is_file():
        raise DataError(
            f"{name}: chat_template must be a template or an existing .jinja file, got {template}; fix the path"
        )
    try:
        return read_utf8(Path(template), TEMPLATE_CHARACTERS)
    except ValueError as error:
        raise DataError(f"{name}: chat_template {template} must be UTF-8, {error}") from None


def tokenizer_trouble(location: str) -> tuple[str, str] | None:
    """Returns why a tokenizer cannot be loaded, and the fix, where transformers' own message would mislead; else None.

    Args:
        location: the model's path or Hub id.
    """
    # One of the files is not UTF-8. transformers says so, but not which.
    folder = Path(location)
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.jinja")]):
        try:
            read_utf8(file)
        except ValueError as error:
            reason, _, fix = str(error).partition("; ")
            return f"{file.name}: {reason}", fix

    # Only SentencePiece's file is there, for which transformers names tiktoken where a package is missing. The file is a
    # protocol buffer, and its first byte the tag of the first field; tiktoken's file is a text.
    file = folder / "tokenizer.model" if folder.is_dir() else try_to_load_from_cache(location, "tokenizer.model")
    model = Path(file) if isinstance(file, (str, Path)) else folder / "tokenizer.model"
    if model.is_file() and not model.with_name("tokenizer.json").exists() and model.read_bytes()[:1] == b"\n":
        packages = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}
        if absent := [package for module, package in packages.items() if not is_installed(module)]:
            return (
                f"a tokenizer.model alone needs {' and '.join(packages.values())}",
                f"run `pip install {' '.join(absent)}`",
            )
    return None


def fix_of(error: Exception, usual: str) -> str:
    """Returns the fix for an error of transformers' loaders: the usual one, unless the cause is one that is known."""
    if "contains custom code" in str(error):
        return "set trust_remote_code: true beside it in the recipe, if you trust that code"
    if "Padding_idx" in str(error):
        return "set pad_token_id in its config.json to the id of a token, or to null"
    return usual


def is_installed(module: str) -> bool:
    """Whether a module can be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would lie in is missing
        return False


def open_model(source: SourceConfig, *, weights: bool = True) -> PreTrainedConfig:
    """Opens a source or the target without loading it, which may take place hours later, and returns its configuration.

    `weights` says whether it will be loaded at all, and must have weights.

    Raises:
        DataError: the configuration cannot be read, names a token that the model has not, or is of no causal language model; a
            model that is here, or cannot be fetched, has no weights, or damaged ones.
    """
    location, options = weights_of(source)
    if (folder := adapter_folder(source)) is not None:
        check_adapter_files(source.name, folder)
    config = read_config(source.name, location, options)
    place = place_of_files(source.name, location, source.revision)
    check_token_ids(source.name, location, config, source.revision)
    check_kind(source.name, location, config, "AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING)
    if "gguf_file" in options:
        check_gguf_blocks(source.name, Path(location) / options["gguf_file"], config)
    elif weights:
        check_weights(source.name, place)
        check_places(AutoModelForCausalLM, source.name, str(place), config, options)
    return config


def place_of_files(name: str, location: str, revision: str | None = None) -> Path:
    """Returns the directory of a model's files. Of a Hub model there is one where nothing can be fetched, with what was downloaded earlier.

    Raises:
        DataError: a file that was downloaded has been deleted since, or is far too large.
    """
    if constants.HF_HUB_OFFLINE and (config := configuration_file(location, "config.json", revision)) is not None:
        check_sizes(name, config.parent)
        return config.parent
    return Path(location)


def read_config(name: str, location: str, options: Mapping[str, Any]) -> PreTrainedConfig:
    """Reads a model's configuration. It raises DataError where it is missing or broken."""
    check_counts(name, Path(location) / "config.json")
    try:
        return configuration(location, options)
    except (
        Exception
    ) as error:  # transformers raises its own kinds for a broken file, and the model's own code may raise any
        raise DataError(
            f"{name}: no model's configuration could be read from {location} ({first_line(error)}); fix the name, or copy or "
            "download it again"
        ) from error


def configuration(location: str, options: Mapping[str, Any]) -> PreTrainedConfig:
    """Returns a model's configuration, which the caller may change. It raises what transformers raises.

    For that of a GGUF file transformers reads the whole vocabulary, which takes seconds. It is therefore read once.
    """
    if "gguf_file" not in options:
        return AutoConfig.from_pretrained(location, **options)
    file = (Path(location) / options["gguf_file"]).stat()
    return copy.deepcopy(_gguf_configuration(location, options["gguf_file"], file.st_mtime_ns, file.st_size))


@functools.lru_cache(maxsize=8)
def _gguf_configuration(location: str, name: str, modified: int, size: int) -> PreTrainedConfig:
    # The time and the size are part of the key, so that another file of this name is read.
    return AutoConfig.from_pretrained(location, gguf_file=name)


def check_counts(name: str, file: Path) -> None:
    """Raises DataError where a configuration asks for so many layers that transformers would build them for hours."""
    try:
        content = parsed(file.read_bytes())
    except (OSError, ValueError):  # whatever is wrong with the file is said when transformers reads it
        return
    waiting = [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend(value.values())
            for key, count in value.items():
                if re.search(r"layers?$|experts?$|blocks?$|labels?$|depth$", key) and is_above(count, MAX_PARTS):
                    raise DataError(
                        f"{name}: a model must have at most {MAX_PARTS:,} layers, experts or labels, {file} gives {key}: "
                        f"{in_short(count)}; correct it, or copy or download it again"
                    )


def is_above(value: object, limit: int) -> bool:
    """Whether a value is a number above a limit."""
    return isinstance(value, (int, float)) and value > limit


def check_sizes(name: str, folder: Path) -> None:
    """Raises DataError where a file of a model that is read as a whole is a link to nothing, larger than any tokenizer is, or has no end
    at all."""
    for file in folder.iterdir() if folder.is_dir() else ():
        if file.exists() and not (
            file.is_file() or file.is_dir()
        ):  # such as a pipe, on which a reader would wait for ever
            raise DataError(f"{name}: a model must consist of files, {file} is none; copy or download it again")
    for pattern in ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"):
        for file in folder.glob(pattern):
            if not file.exists():  # the cache of the Hub has links
                raise DataError(
                    f"{name}: a model must have all its files, {file} is a link to what is not there; copy or download it again"
                )
            if (size := file.stat().st_size) > MAX_FILE_BYTES:
                raise DataError(
                    f"{name}: {file} must have at most {MAX_FILE_BYTES >> 20} MiB, it has {size >> 20:,} MiB; copy or download it "
                    "again, or take it out of the directory if the model does not need it"
                )


def check_kind(name: str, location: str, config: PreTrainedConfig, kind: str, known: Container[type]) -> None:
    """Raises DataError unless transformers, or the model's own code, has a class of this kind for a configuration."""
    if type(config) not in known and kind not in (getattr(config, "auto_map", None) or {}):
        raise DataError(
            f"{name}: a model must be loadable as {kind}, {location} is of type {config.model_type!r}, which is not; name another"
        )


def check_places(
    kind: AutoModel,
    name: str,
    location: str,
    config: PreTrainedConfig,
    options: Mapping[str, Any],
    brought: Collection[str] | None = None,
) -> None:
    """Raises DataError unless a local model's files hold its weights. Nothing but their names and shapes is read.

    Quantised weights are left for later, because the packages that unpack them may need the device on which they run.
    """
    if Path(location).is_dir() and getattr(config, "quantization_config", None) is None:
        files = ((file.name, file.stat()) for file in Path(location).iterdir() if file.exists())
        stamps = frozenset(
            (name, stat.st_ino, stat.st_ctime_ns, stat.st_mtime_ns, stat.st_size) for name, stat in files
        )
        _load_places(
            kind, name, location, stamps, tuple(options.items()), brought if brought is None else frozenset(brought)
        )


@functools.lru_cache(maxsize=64)
def _load_places(
    kind: AutoModel,
    name: str,
    location: str,
    stamps: frozenset[tuple[str, int, int, int, int]],
    options: tuple[tuple[str, Any], ...],
    brought: frozenset[str] | None,
) -> None:
    """Loads a model without its weights. The `stamps` of its files are the key under which this is done once."""
    load(kind, name, location, {**dict(options), "device_map": "meta"}, brought)


def load(
    kind: AutoModel, name: str, location: str, options: Mapping[str, Any], brought: Collection[str] | None = None
) -> PreTrainedModel:
    """Does what `loaded_model` does. Whatever is raised in it becomes a DataError, but for a lack of memory."""
    try:
        if "gguf_file" in options:
            options = {**options, "config": configuration(location, options)}
        return loaded_model(kind, name, location, options, brought)
    except (torch.OutOfMemoryError, DataError):
        raise
    except Exception as error:  # transformers, safetensors and torch each raise their own kinds for a broken file
        what, fix = KINDS[kind]
        if "gguf_file" in options:
            fix = "transformers must know the architecture of a GGUF file: give the model's safetensors instead"
        raise DataError(
            f"{name}: no {what} could be loaded from {location} ({first_line(error)}); {fix_of(error, fix)}"
        ) from error


KINDS: dict[AutoModel, tuple[str, str]] = {
    AutoModelForCausalLM: ("causal language model", "copy or download it again"),
    AutoModelForSequenceClassification: ("reward model", "copy or download it again, or name another"),
}
"""What each of transformers' classes loads, and what can be done where it does not."""


def free_memory() -> None:
    """Gives back what a model that is no longer needed has left in memory, and what torch keeps of a GPU's."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def load_model(
    source: SourceConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    packs: bool = False,
    spreads: bool = False,
    quantization: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """Loads a source's model, in evaluation mode.

    Args:
        packs: whether it will read packed sequences. It then uses flash-attention where that is installed and supported.
        spreads: whether it may be spread over all GPUs, if the source says so.
        quantization: how its linear layers are quantised while they are loaded.

    Raises:
        DataError: the directory is missing or does not hold a loadable causal language model.
    """
    location, options = weights_of(source)
    if packs and (attention := flash_attention(configuration(location, options), device)):
        options["attn_implementation"] = attention
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
        # transformers shows a progress bar while it reads a GGUF file. With disable=None it appears on a terminal only.
        modeling_gguf_pytorch_utils.tqdm = functools.partial(tqdm, disable=None, leave=False)  # pyrefly: ignore[bad-assignment]
    if quantization is not None:
        options |= {"quantization_config": quantization, "device_map": {"": torch.device(device)}}
    if spreads := spreads and source.device_map is not None and torch.device(device).type == "cuda":
        options["device_map"] = source.device_map
    folder = adapter_folder(source)
    assert folder is None or quantization is None, (
        "weights that are quantised while they are loaded cannot be merged with others"
    )
    model: Any = load(AutoModelForCausalLM, source.name, location, {**options, "dtype": dtype})
    if folder is not None:
        model = merged(source.name, folder, model)
    if spreads:
        check_spread(source.name, model)
    return model.eval() if quantization is not None or spreads else model.to(device).eval()


def check_spread(name: str, model: PreTrainedModel) -> None:
    """Raises DataError unless all weights of a model that is spread over GPUs are on them."""
    placed = {parameter.device.type for parameter in model.parameters()}
    if away := placed - {"cuda"}:
        raise DataError(
            f"{name}: a source with device_map auto must fit on the GPUs together, a part of its weights is on "
            f"{' and '.join(sorted(away)).replace('meta', 'the disk')}; use more or larger GPUs, or another model"
        )


def load_without_weights(source: SourceConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a source's model on the meta device, in evaluation mode.

    Raises:
        DataError: what `open_model` raises, or the model cannot be built as its configuration says.
    """
    config = open_model(source, weights=False)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code, dtype=dtype)
    except Exception as error:  # transformers and the model's own code may raise any
        if is_lack_of_memory(error):
            raise
        location, _ = weights_of(source)
        raise DataError(
            f"{source.name}: no causal language model could be built as the configuration of {location} says ({first_line(error)}); "
            f"{fix_of(error, 'correct it, or take another model')}"
        ) from error
    return model.eval()


def stored_dtype(source: SourceConfig) -> torch.dtype:
    """Returns the dtype in which a model's weights are stored, or fp32 where its config does not say."""
    location, options = weights_of(source)
    stored: Any = getattr(configuration(location, options), "dtype", None)
    return stored or torch.float32


def chat_format(source: SourceConfig, *, date: datetime.date | None = None) -> ChatFormat:
    """Returns a source's chat format. Its end-of-turn tokens are the tokenizer's and those of the generation config.

    `date` is what its chat template gets; None means today.

    Raises:
        DataError: the generation config's end token is plain text to the tokenizer. And what `load_tokenizer`, `end_tokens` and
            ChatFormat raise.
    """
    tokenizer, ends = load_tokenizer(source), end_tokens(source)
    if text := [i for i in ends if is_plain_text(tokenizer, i)]:
        raise DataError(
            f"{source.name}: eos_token_id in generation_config.json of {weights_of(source)[0]} must be a control token, {text[0]} is "
            f"{tokenizer.decode(text)!r} to the tokenizer, at which answers would end in the middle; correct it"
        )
    ends = sorted({*ends, tokenizer.eos_token_id} - {None})
    return ChatFormat(tokenizer, end_ids=ends, name=source.name, date=date, fix=template_fix(source))


def chat_template(source: SourceConfig, *, date: datetime.date | None = None) -> ChatTemplate:
    """Returns a source's chat template. It raises what `load_tokenizer` and ChatTemplate raise."""
    return ChatTemplate(load_tokenizer(source), name=source.name, date=date, fix=template_fix(source))


def template_fix(source: SourceConfig) -> str:
    """Returns what can be done about a source's chat template where it does not fit."""
    return FIX_IN_RECIPE if source.chat_template is None else FIX_OF_RECIPES_OWN


def is_plain_text(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is one that texts are made of. A tokenizer with code of its own may not list its control tokens, so that one which
    is spelt like a control token counts as one."""
    if token >= len(tokenizer) or token in tokenizer.added_tokens_decoder or token in tokenizer.all_special_ids:
        return False
    return not str(tokenizer.decode([token])).lstrip().startswith(("<", "[", "|"))


def end_tokens(source: SourceConfig) -> list[int]:
    """Returns the end tokens of a model's generation config; there are none where it has no such file.

    Raises:
        DataError: the file is there and cannot be read, or its `eos_token_id` is neither an id nor a list of ids.
    """
    location, revision = weights_of(source)[0], source.revision or "main"
    again = "correct it, copy or download it again, or delete it if the model needs none"
    try:
        eos = GenerationConfig.from_pretrained(location, revision=revision).eos_token_id
    except (
        Exception
    ) as error:  # transformers raises an OSError where the file is not there, and any kind for a broken one
        if isinstance(error, OSError) and configuration_file(location, "generation_config.json", revision) is None:
            return []
        raise DataError(
            f"{source.name}: generation_config.json of {location} cannot be read ({first_line(error)}); {again}"
        ) from error
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if any(type(i) is not int or not 0 <= i < MAX_ID for i in ids):
        raise DataError(
            f"{source.name}: eos_token_id in generation_config.json of {location} must be a token's id or a list of ids, got "
            f"{in_short(eos)}; {again}"
        )
    return ids


def existing(location: str, name: str) -> str:
    """Returns the path or Hub id of a model. `name` is the model's name in the recipe, for the error message.

    Raises:
        DataError: the location is a local path or a `demo:NAME`, and there is nothing, or a file that is far too large.
    """
    check_model(name, location)
    path = resolve(location)
    check_sizes(name, Path(path))
    return path


def weights_of(source: SourceConfig) -> tuple[str, dict[str, Any]]:
    """Returns the location and the options that transformers' loaders take for a source.

    Of an adapter they are those of its base. A model may also be a GGUF file, or a directory that holds a GGUF file and no config.json;
    transformers reads these, too.

    Raises:
        DataError: the directory does not exist, or it holds several GGUF files or a part of one; the GGUF file's header is
            damaged; the `gguf` package is missing; a revision is given for a local model.
    """
    if (base := base_of(source)) is not None:
        return weights_of(base)
    location = existing(source.model, source.name)
    if source.revision is not None and Path(location).exists():
        raise DataError(
            f"{source.name}: a revision must be of a Hub model, got {source.revision} for the local {location}; take it out"
        )
    options: dict[str, Any] = {"revision": source.revision, "trust_remote_code": source.trust_remote_code}
    file = gguf_file(Path(location), source.name)
    if file is None:
        return location, options
    if not is_installed("gguf"):
        raise DataError(
            f"{source.name}: reading {file} needs the gguf package, it is not installed; run `pip install gguf`"
        )
    gguf_tensors(source.name, file)  # transformers would follow the counts of a damaged header for as long as they say
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


def check_vocabulary(name: str, chat: ChatFormat, rows: int) -> None:
    """Raises DataError if a token of text or an end of turn has an id for which the head has no row.

    A control token that is never used may have such an id.
    """
    check_ids(
        name, [i for i, piece in enumerate(chat.token_bytes.pieces) if piece is not None] + list(chat.end_ids), rows
    )


def check_ids(name: str, ids: Iterable[int], rows: int) -> None:
    """Raises DataError if a model has fewer rows than one of these ids of its tokenizer asks for."""
    last = max(ids, default=-1)
    if last >= rows:
        raise DataError(
            f"{name}: a model must have an embedding for every token, its tokenizer has the id {last} and its head only "
            f"{rows} rows; use the tokenizer that came with it"
        )
