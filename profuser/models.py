"""Loading models and tokenizers, and the one thing the engine needs of a model: hidden states and its head.

A causal language model is used as `hidden = base(input_ids)`, `logits = head(hidden)`. Models that do something between
the two (a final softcap, a logit scale, a head bias) are honoured when their configuration says so; `head_of` checks
the result against the model's own logits once and refuses a model that it cannot reproduce.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    modeling_gguf_pytorch_utils,
)

from profuser.chat import ChatFormat
from profuser.config import SourceConfig, is_path, resolve
from profuser.errors import DataError
from profuser.kernels.head import Head


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model, checked against the model's own logits.

    Raises:
        DataError: the model is no decoder with a plain head, or hidden states and head do not give its logits.
        TypeError: it is no model.
    """
    if not (isinstance(model, nn.Module) and hasattr(model, "config")):
        raise TypeError(
            f"a model must be a loaded one, not wrapped, got {type(model).__name__}; AutoModelForCausalLM.from_pretrained loads it"
        )
    if model.config.is_encoder_decoder:
        raise DataError(f"a model must be a decoder alone, {type(model).__name__} has an encoder; use another")
    layer = head_layer(model)
    config = model.config.get_text_config()
    scale = 1.0
    for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if isinstance(value := getattr(config, key, None), int | float):
            scale = float(value)
    if scaling := getattr(config, "logits_scaling", None):  # a divisor, but for one family
        scale = float(scaling) if config.model_type == "hyperclovax" else scale / float(scaling)
    softcaps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((cap for key in softcaps if (cap := getattr(config, key, None))), None)
    head = Head(layer.weight, getattr(layer, "bias", None), softcap, scale)
    with evaluating(model):
        check_head_logits(head, model, layer)
    return head


@torch.no_grad()
def check_head_logits(head: Head, model: PreTrainedModel, layer: nn.Module) -> None:
    """Raises DataError unless `head`, read from `layer` and the model's config, gives the model's own logits."""
    ids = torch.arange(1, 9, device=model.device)[None] % head.weight.shape[0]
    product = hidden_states(model, ids, None).float() @ head.weight.float().T
    product = product if head.bias is None else product + head.bias.float()
    # Enlarged to 50: the small logits of an untrained model would not show a softcap.
    enlarge = (50 / product.abs().max()).clamp(max=torch.finfo(head.weight.dtype).max / 2)
    ours = head.logit_scale * enlarge * product
    ours = ours if head.softcap is None else head.softcap * torch.tanh(ours / head.softcap)
    hook = layer.register_forward_hook(lambda layer, args, out: out * enlarge.to(out.dtype))
    try:
        own = model(input_ids=ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    if not own.isfinite().all():
        raise DataError(
            f"a model's logits must be finite, {type(model).__name__}'s are not; its weights are damaged, or too large for "
            f"{model.dtype}"
        )
    if own.shape[-1] != ours.shape[-1]:
        raise DataError(
            f"a model's logits must be those of its head, {type(model).__name__} gives {own.shape[-1]} for {ours.shape[-1]}; use "
            "another model"
        )
    if own.shape != ours.shape:
        raise DataError(
            f"a model must give one row of logits a token, {type(model).__name__} gives {own.shape[1]} for "
            f"{ours.shape[1]}; prompt tuning is not supported, use LoRA"
        )
    rounding = max(8 * torch.finfo(head.weight.dtype).eps, 1e-3)
    if not torch.allclose(own, ours, rtol=0, atol=rounding * own.abs().max().item()):
        raise DataError(
            f"a model's logits must be softcap·tanh(scale·head(hidden)/softcap) as its config says, "
            f"{type(model).__name__}'s differ by {(own - ours).abs().max():.3g}; use another model"
        )


def head_layer(model: PreTrainedModel) -> nn.Module:
    """The linear layer behind a model's logits.

    Raises:
        DataError: there is none, or an adapter stands on it.
    """
    layer = model.get_output_embeddings()
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        raise DataError(f"a model must have a linear language-model head, {type(model).__name__} has none; use another")
    if not weight.dtype.is_floating_point:
        raise DataError(
            f"a head must be floating point, {type(model).__name__}'s is {weight.dtype}; leave lm_head unquantised"
        )
    if hasattr(layer, "base_layer"):
        raise DataError(
            "a head must be one linear layer, this one has an adapter, which the fused loss would not see; take lm_head out "
            "of LoRA's target_modules, or train it whole with modules_to_save=['lm_head']"
        )
    return layer


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All modules in evaluation mode, and afterwards each as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def hidden_states(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **inputs
) -> torch.Tensor:
    """Last hidden states (B, T, D) of a causal language model, without its logits."""
    if hasattr(model, "get_base_model"):  # peft's wrapper: the adapters are inside the model that it wraps
        model = model.get_base_model()
    if model.base_model is model:
        raise DataError(f"a model must have its head apart, {type(model).__name__} names no base model; use another")
    inputs = {name: value for name, value in inputs.items() if value is not None}  # not every model has each
    out = model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **inputs)
    return out.last_hidden_state


def load_tokenizer(source: SourceConfig):
    """A source's tokenizer, with the recipe's chat template when it gives one."""
    location, options = weights_of(source)
    if (Path(location) / "tokenizer.json").exists():
        options.pop("gguf_file", None)  # the original tokenizer beside a converted model
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:  # transformers and tokenizers each raise their own kinds for a broken file
        raise DataError(
            f"{source.name}: no tokenizer could be loaded from {location} ({first_line(error)}); give a directory with "
            "a tokenizer.json, or the id of a Hub model that is downloaded"
        ) from error
    if source.chat_template is not None:
        template = Path(source.chat_template)
        is_file = source.chat_template.endswith((".jinja", ".jinja2"))
        if is_file and not template.is_file():
            raise DataError(
                f"{source.name}: chat_template must be a template or an existing .jinja file, got {template}"
            )
        tokenizer.chat_template = template.read_text() if is_file else source.chat_template
    return tokenizer


def load_model(source: SourceConfig, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A source's weights in evaluation mode.

    Raises:
        DataError: the directory is missing or does not hold a loadable causal language model.
    """
    location, options = weights_of(source)
    if "gguf_file" in options:
        options["quantization_config"] = GgufConfig(dequantize=True)
        modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=None, leave=False)  # its bar: on terminals only
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
    """The dtype that a model's weights came in; fp32 where its config does not say."""
    location, options = weights_of(source)
    return getattr(AutoConfig.from_pretrained(location, **options), "dtype", None) or torch.float32


def load_reward_model(name: str, location: str, trust_remote_code: bool, device: torch.device | str = "cpu"):
    """A judge's weights and tokenizer; it must have exactly one output."""
    path = existing(location, name)
    try:
        model, loaded = AutoModelForSequenceClassification.from_pretrained(
            path, trust_remote_code=trust_remote_code, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in load_model
        raise DataError(f"judge {name}: no reward model could be loaded from {path} ({first_line(error)})") from error
    check_loaded(f"judge {name}", path, loaded)
    if model.config.num_labels != 1:
        raise DataError(
            f"judge {name}: a reward model must have 1 output, got {model.config.num_labels}; use another model"
        )
    return model.to(device).eval(), tokenizer


def chat_format(source: SourceConfig, tokenizer=None) -> ChatFormat:
    """A source's chat format with all of its end-of-turn tokens (tokenizer's and generation config's)."""
    tokenizer = tokenizer or load_tokenizer(source)
    ends = {tokenizer.eos_token_id}
    with contextlib.suppress(OSError):  # a model need not bring one
        eos = GenerationConfig.from_pretrained(weights_of(source)[0], revision=source.revision).eos_token_id
        ends |= {i for i in (eos if isinstance(eos, list) else [eos]) if isinstance(i, int)}
    return ChatFormat(tokenizer, end_ids=sorted(ends - {None}))


def existing(location: str, name: str) -> str:
    """The resolved place of a model; a path that does not exist is an error and never a Hub id."""
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
    """(location, options) for transformers' loaders; a GGUF file, or a directory with nothing else, is read by them, too.

    Raises:
        DataError: no such directory; several GGUF files; a part of one; the `gguf` package is missing.
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
    """The GGUF file that a model's place means; None for a model in any other form."""
    if path.is_file() and path.suffix == ".gguf":
        found = [path]
    elif path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
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


SAMPLE = 1 << 20


def fingerprint(location: str) -> str:
    """Short hash of a model's files: names, sizes, contents (samples of them where a file is large); a Hub id is its own."""
    path = Path(resolve(location))
    digest = hashlib.sha256()
    if not path.exists():
        return location
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file() and p.suffix != ".md")
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as data:
            for start in range(0, size, max(SAMPLE, size // 64)):  # all of a small file, 64 samples of a large one
                data.seek(start)
                digest.update(data.read(SAMPLE))
    return digest.hexdigest()[:16]


def runtime_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto → bfloat16 on CUDA, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def check_vocabulary(name: str, chat: ChatFormat, head: torch.Tensor) -> None:
    """Raises DataError where text or the end of turn has ids beyond the (V, D) head; an unused control token may."""
    last = max([i for i, piece in enumerate(chat.token_bytes.pieces) if piece is not None] + list(chat.end_ids))
    if last >= len(head):
        raise DataError(
            f"{name}: a model must have an embedding for every token, its tokenizer has the id {last} and its head {len(head)} rows; "
            "use the tokenizer that came with it"
        )


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
