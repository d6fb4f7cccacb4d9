"""Whether a model's files hold the weights of its model: all of them, no others, and each in its shape.

transformers makes up the weights that the files lack, and drops those that the model has no place for. Half a model, such as
one whose config.json was edited, would therefore load in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from profuser.errors import DataError
from profuser.models.gguf_header import gguf_tensors
from profuser.typed import FILE_NAME, read_json

AutoModel = type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification]

HARMLESS = re.compile(
    r"rotary\w*\.(original_)?inv_freq$"  # what a model computes by itself, and older versions stored
    r"|(^|\.)position_ids$"
    r"|\.(attn|attention)\.(masked_bias|bias|causal_mask)$"  # the causal mask; a layer's own bias has the layer's name
    r"|\._extra_state$"
    r"|(^|\.)(mtp|nextn)\w*\."  # layers that guess further tokens ahead, which training and sampling do not use
    r"|^rope_(freqs|factors_long|factors_short)\.weight$"  # GGUF's, which transformers takes from the configuration
)
"""Weights that a model does without, although its files hold them."""

SAVE = "load it with transformers, save the model and its tokenizer to a directory, and give that"
KNOWN = {
    r"(^|\.)(score|v_head|value_head|reward_head|classifier)\.": "this is a reward model: give a language model",
    r"lora_[AB]|(^|\.)adapter": "merge the adapter into the weights (peft's merge_and_unload), save the model, and give that",
    r"\.(qweight|qzeros|scales|g_idx|absmax|quant_map|weight_scale\w*)$|\.quant_state\.": (
        "the weights are quantised and its config.json does not say how: copy or download both again"
    ),
    r"(^|\.)(vision|visual|audio|image|speech|multi_modal|mm)\w*\.": f"only its text model can be used: {SAVE}",
}
"""Why a file may hold more than its model uses, by the weights' names, with what can be done."""

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|blk|block)\.(\d+)\.")


def check_weights(name: str, folder: Path) -> None:
    """Raises DataError where a local model's weights are missing or damaged. Only headers are read."""
    for index in folder.glob("*.safetensors.index.json"):
        check_index(name, folder, index)
    pickled = any(file.exists() for file in folder.glob("pytorch_model*.bin"))
    if folder.is_dir() and not pickled and not list(opened_weights(name, folder)):
        raise DataError(
            f"{name}: a model must have weights, {folder} holds neither safetensors nor a pytorch_model.bin; copy or download "
            "it again"
        )


def check_index(name: str, folder: Path, index: Path) -> None:
    """Raises DataError unless the index of a model's weights lists the files that are there, and no others."""
    listed = read_json(index, {"weight_map": {str: FILE_NAME}}, fix="copy or download it again")
    parts = sorted(set(listed["weight_map"].values()))
    if not parts:
        raise DataError(f"{name}: {index} must list the files of the weights, got none; copy or download it again")
    if absent := [part for part in parts if not (folder / part).is_file()]:
        raise DataError(
            f"{name}: a model must have all its weights, {folder} lacks {absent[0]} ({len(absent)} of {len(parts)} files); "
            "copy or download it again"
        )
    stem = index.name.removesuffix(".safetensors.index.json")
    there = {
        file.name for file in folder.glob("*.safetensors") if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+", file.stem)
    }
    if others := sorted(there - set(parts)):
        raise DataError(
            f"{name}: {index} must list all files of the weights, {others[0]} is not in it; copy or download the model again, or "
            "delete that file if it is left over from another"
        )


def opened_weights(name: str, folder: Path) -> Iterator[Any]:
    """Yields the safetensors files of a model, opened to read their headers. It raises what `opened` raises."""
    for file in sorted(folder.glob("*.safetensors")):
        with opened(
            name, file, "numpy"
        ) as weights:  # better to fail now than after the models before this one have been run
            yield weights


def opened(name: str, file: Path, framework: str) -> Any:
    """Opens a safetensors file of a model for a `with` block.

    Raises:
        DataError: it is truncated or damaged.
    """
    try:
        return safe_open(file, framework=framework)
    except (SafetensorError, OSError) as error:
        raise DataError(f"{name}: the weights {file} cannot be read ({error}); copy or download them again") from None


def loaded_model(
    kind: AutoModel, name: str, location: str, options: Mapping[str, Any], brought: Collection[str] | None = None
) -> PreTrainedModel:
    """Loads a model with one of transformers' classes, and checks that its files hold its weights.

    With `device_map="meta"` in `options` no weights are read, but all that is checked of them is checked.

    Args:
        brought: of the base of a reward model's adapter, the weights that the adapter has whole; the base may lack these.

    Raises:
        DataError: weights are missing, have no place in the model, or have another shape than its configuration says.
        Exception: whatever transformers, safetensors and torch raise for a broken file.
    """
    # Without ignore_mismatched_sizes, transformers' error says nothing but that there is a report, which it logs.
    model, found = kind.from_pretrained(location, **options, output_loading_info=True, ignore_mismatched_sizes=True)
    judge = kind is AutoModelForSequenceClassification
    extra = sorted(key for key in found["unexpected_keys"] if not HARMLESS.search(key))
    if judge or model.config.get_text_config().tie_word_embeddings:  # a judge, or a model whose head is the embedding
        extra = [key for key in extra if key != "lm_head.weight"]
    absent, mismatched = sorted(found["missing_keys"]), sorted(found["mismatched_keys"])
    if brought is not None:
        mismatched = [wrong for wrong in mismatched if wrong[0] not in brought]
        if absent := [key for key in absent if key not in brought]:
            raise DataError(
                f"{name}: an adapter and its base must hold every weight of a reward model together, {len(absent)} are in neither "
                f"({absent[0]}); save the score head with the adapter (peft's modules_to_save), or give a base that has one"
            )
    if absent:
        raise DataError(
            f"{name}: {location} must hold every weight of its model, {len(absent)} are missing ({absent[0]}); copy or "
            "download it again, or fix its config.json"
        )
    if mismatched:
        key, shape, expected = mismatched[0]
        raise DataError(
            f"{name}: {location} must hold weights of the shapes that its config.json gives, {len(mismatched)} have others "
            f"({key} is {list(shape)} and not {list(expected)}); copy or download it again, or fix its config.json"
        )
    if extra:
        raise DataError(has_no_place(name, location, extra, model.config, judge))
    if "gguf_file" in options and options.get("device_map") != "meta":
        check_gguf_count(name, Path(location) / options["gguf_file"], model)
    return model


def has_no_place(name: str, location: str, extra: list[str], config: PreTrainedConfig, judge: bool = False) -> str:
    """Returns the message for weights that a model has no place for, with what can be done about them."""
    layers = layers_of(config)
    reason = next((fix for pattern, fix in KNOWN.items() if re.search(pattern, extra[0])), None)
    block = BLOCK.search(extra[0])
    if block and layers is not None and int(block[1]) >= layers:
        fix = f"fix the number of layers in its configuration, which is {layers}, or copy or download it again"
    elif reason is not None and not judge:
        fix = reason
    else:
        fix = f"copy or download it again, fix its config.json, or if it is whole without them {SAVE}"
    return f"{name}: {location} must hold no other weights than its model's, {len(extra)} have no place in it ({extra[0]}); {fix}"


def layers_of(config: PreTrainedConfig) -> int | None:
    """Returns the number of layers of a model's text part; None where its configuration has another word for it."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    return layers if isinstance(layers, int) else None


def check_gguf_blocks(name: str, file: Path, config: PreTrainedConfig) -> None:
    """Raises DataError where a GGUF file is damaged, or holds more blocks than transformers would load by its metadata."""
    tensors, layers = gguf_tensors(name, file), layers_of(config)
    extra = [key for key in tensors if layers is not None and (block := BLOCK.search(key)) and int(block[1]) >= layers]
    if extra:
        raise DataError(has_no_place(name, str(file), sorted(extra), config))


def check_gguf_count(name: str, file: Path, model: PreTrainedModel) -> None:
    """Raises DataError unless a model has as many weights as its GGUF file, of which transformers drops what it cannot place."""
    held = sum(count for key, count in gguf_tensors(name, file).items() if not HARMLESS.search(key))
    stored = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}  # tied weights count once
    if held != sum(stored.values()):
        raise DataError(
            f"{name}: a model must use all weights of its GGUF file, {file} holds {held:,} and transformers has placed "
            f"{sum(stored.values()):,}; give the model's safetensors instead"
        )
