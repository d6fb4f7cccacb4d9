"""What is merged and how: from the command line, or from a YAML file in mergekit's form.

Of mergekit's YAML these keys are understood: merge_method, models or one slice over whole models, base_model, parameters (with
filters and gradients over the layers), dtype, out_dtype and tokenizer_source: base. Any other is refused by its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from profuser.errors import ConfigError, first_line, in_short
from profuser.recipe.utf8 import read_utf8
from profuser.recipe.yaml_text import CHARACTERS, load_yaml

METHODS = {
    "linear": "the weighted mean",
    "slerp": "spherical interpolation of two models",
    "task_arithmetic": "the base plus weighted task vectors",
    "ties": "task vectors trimmed by magnitude, with elected signs",
    "dare_linear": "task vectors of which a random share is kept",
    "dare_ties": "the same, with elected signs",
    "widen": "task vectors weighted by how much magnitudes and directions change",
}
WITH_BASE = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "widen")
NORMALIZED = ("linear", "ties")
IGNORED = ("int8_mask", "rescale")
"""Settings of mergekit that change no result here: its masks' dtype, and DARE's rescaling, which is always done."""
USED = {
    "linear": ("weight", "normalize"),
    "slerp": ("t",),
    "task_arithmetic": ("weight", "lambda", "normalize"),
    "ties": ("weight", "density", "lambda", "normalize"),
    "dare_linear": ("weight", "density", "lambda", "normalize"),
    "dare_ties": ("weight", "density", "lambda", "normalize"),
    "widen": (),
}
DTYPES = ("float32", "float16", "bfloat16")
LARGEST = 1e30
"""No number of a merge is as large. One that is would only make weights infinite."""

Setting = Any
"""A number or boolean, a list of numbers (a gradient over the layers), or a list of {filter, value}."""


@dataclass(kw_only=True)
class MergedModel:
    """One of the models that are merged, with its own settings.

    layer_range: the layers that a slice of mergekit's names, from the first up to but not including the last, which must be all.
    """

    model: str
    parameters: dict[str, Setting] = field(default_factory=dict)
    layer_range: list[int] | None = None


@dataclass(kw_only=True)
class MergeSettings:
    """A merge.

    method: one of METHODS. base: the model that the others were trained from, for the methods that need one, and the first
        one of slerp.
    parameters: settings for all models.
    dtype: of the result; None keeps that of the base or the first model.
    seed: of what DARE drops.
    """

    method: str
    models: list[MergedModel]
    base: str | None = None
    parameters: dict[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            near = difflib.get_close_matches(f"{self.method}", METHODS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {in_short(self.method)}{hint}")
        if self.method in WITH_BASE and self.base is None:
            raise ConfigError(
                f"method {self.method} needs the model that the others were trained from, there is none; give --base"
            )
        self.models = [model for model in self.models if model.model != self.base]
        named = len(self.models) + (self.base is not None and self.method == "slerp")
        if self.method == "slerp" and named != 2:
            raise ConfigError(f"method slerp needs exactly two models, got {named}; merge more with linear or widen")
        if self.method == "slerp" and self.base is None:
            self.base, self.models = self.models[0].model, self.models[1:]
        if self.method == "linear" and self.base is not None:
            raise ConfigError(f"method linear has no base, got {self.base}; leave it out, or use task_arithmetic")
        if not self.models or (self.method == "linear" and len(self.models) < 2):
            raise ConfigError(
                f"a merge must have {'two models or more' if self.method == 'linear' else 'a model beside its base'}, got "
                f"{len(self.models)}; name them with --models"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(
                f"dtype must be one of {', '.join(DTYPES)}, got {in_short(self.dtype)}; leave it out to keep it"
            )
        for owner in (self, *self.models):
            for key, setting in owner.parameters.items():
                self._check(key, setting)
        if self.method == "slerp" and "t" not in self.parameters:
            raise ConfigError("method slerp needs t, the way from the first model (0) to the second (1); give --t 0.5")

    @property
    def names(self) -> list[str]:
        """All models that are read, the base in front."""
        return [*([] if self.base is None else [self.base]), *(model.model for model in self.models)]

    def _check(self, key: str, setting: Setting) -> None:
        if key in IGNORED:
            return
        if key not in USED[self.method]:
            used = ", ".join(USED[self.method]) or "none"
            raise ConfigError(f"method {self.method} has the settings {used}, got {key}; leave it out")
        for value in _values(key, setting):
            if key == "normalize":
                if not isinstance(value, bool):
                    raise ConfigError(f"normalize must be true or false, got {in_short(value)}")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST:
                raise ConfigError(
                    f"{key} must be a number that is not infinite, a list of numbers, or filters with numbers, got "
                    f"{in_short(value)}"
                )
            elif key == "density" and not 0 < value <= 1:
                raise ConfigError(f"density must be in (0, 1], the share of a task vector that is kept, got {value:g}")

    def value(self, key: str, tensor: str, place: float, model: MergedModel | None, default: Any = None) -> Any:
        """A setting for one tensor: the model's own, or that for all models.

        Args:
            place: where the tensor's layer stands, from 0 to 1; tensors outside of the layers stand at 0, as in mergekit.
        """
        for owner in (model, self):
            if owner is not None and key in owner.parameters:
                found = _evaluated(owner.parameters[key], tensor, place)
                if found is not None:
                    return found
        return default


def _values(key: str, setting: Setting) -> list[Any]:
    """All single values of a setting."""
    if not isinstance(setting, list):
        setting = [setting] if not isinstance(setting, Mapping) else [dict(setting)]
    elif key == "normalize" and not any(isinstance(part, Mapping) for part in setting):
        return [setting]  # what is true or false has no gradient
    if not setting:
        raise ConfigError(f"{key} must not be an empty list; give a number")
    if len({isinstance(part, Mapping) for part in setting}) > 1:
        raise ConfigError(
            f"{key} must be either a list of numbers or one of {{filter, value}}, got {in_short(setting)}"
        )
    found: list[Any] = []
    for part in setting:
        if isinstance(part, Mapping):
            filtered = part.get("filter")
            if "value" not in part or set(part) - {"filter", "value"} or not isinstance(filtered, str | None):
                raise ConfigError(f"{key} with filters must be a list of {{filter, value}}, got {in_short(dict(part))}")
            found += _values(key, part["value"])
        else:
            found.append(part)
    return found


def _evaluated(setting: Setting, tensor: str, place: float) -> Any:
    """A setting's value for one tensor: a gradient is interpolated, and of filters the first that fits counts."""
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return setting
    if not isinstance(setting[0], Mapping):
        at = place * (len(setting) - 1)
        low = min(int(at), len(setting) - 1)
        high = min(low + 1, len(setting) - 1)
        return setting[low] + (at - low) * (setting[high] - setting[low])
    for part in setting:
        wanted = part.get("filter")
        if wanted in (None, "*") or wanted in tensor:
            return _evaluated(part["value"], tensor, place)
    return None


# --- a command line ---------------------------------------------------------------------------------------------------


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


# --- mergekit's YAML -------------------------------------------------------------------------------------------------

KEYS = ("merge_method", "models", "slices", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source")


def read_settings(path: Path, seed: int = 0) -> MergeSettings:
    """Reads a YAML file in mergekit's form.

    Raises:
        ConfigError: the file is missing, no YAML, or asks for something that is not understood here.
    """
    if not path.is_file():
        raise ConfigError(f"--config must be an existing YAML file, got {path}; fix the path")
    try:
        found = load_yaml(read_utf8(path, CHARACTERS))
    except (yaml.YAMLError, ValueError) as error:
        reason = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path} must be YAML, got: {' '.join(str(reason).split())}; fix it there") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold keys such as merge_method and models, got {in_short(found)}")
    for key in found:
        if key not in KEYS:
            near = difflib.get_close_matches(str(key), KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else "leave it out"
            raise ConfigError(f"{path}: a key must be one of {', '.join(KEYS)}, got {in_short(key)}; {hint}")
    if "merge_method" not in found:
        raise ConfigError(f"{path} must name its merge_method, one of {', '.join(METHODS)}")
    if found.get("tokenizer_source", "base") != "base":
        raise ConfigError(
            f"{path}: tokenizer_source must be base, got {in_short(found['tokenizer_source'])}; the vocabulary of the base is kept, "
            "and tokens of equal bytes are merged"
        )
    models = [_model(path, entry) for entry in _entries(path, found)]
    base = found.get("base_model")
    of_base = [model for model in models if model.model == base and model.parameters]
    if of_base and found["merge_method"] in WITH_BASE:
        of_base[0].parameters.clear()  # a base has no task vector that they could be about
    return MergeSettings(
        method=found["merge_method"],
        models=models,
        base=None if base is None else _name(path, base),
        parameters=_parameters(path, found.get("parameters")),
        dtype=found["out_dtype"] if found.get("out_dtype") is not None else found.get("dtype"),
        seed=seed,
    )


def _entries(path: Path, found: Mapping[str, Any]) -> Sequence[Any]:
    """The entries of the models; a single slice that takes all layers of every model is the same as models."""
    if ("models" in found) == ("slices" in found):
        raise ConfigError(f"{path} must have either models or slices; name the models")
    if "models" in found:
        entries = found["models"]
    else:
        slices = found["slices"]
        entries = (
            slices[0].get("sources")
            if isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], dict)
            else None
        )
        entries = entries if isinstance(entries, list) else []
        ranges = {str(entry.get("layer_range")) for entry in entries if isinstance(entry, dict)}
        if not entries or len(ranges) != 1 or set(slices[0]) - {"sources"}:
            raise ConfigError(
                f"{path}: slices must be one slice with the same layers of every model; layers of different models are not put "
                "together here, use mergekit's passthrough for that"
            )
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path}: models must be a list of entries with `model`, got {in_short(entries)}")
    return entries


def _model(path: Path, entry: Any) -> MergedModel:
    if not isinstance(entry, dict) or "model" not in entry or set(entry) - {"model", "parameters", "layer_range"}:
        raise ConfigError(f"{path}: an entry of models must have model and perhaps parameters, got {in_short(entry)}")
    layers = entry.get("layer_range")
    if layers is not None and not (
        isinstance(layers, list) and len(layers) == 2 and all(type(n) is int for n in layers)
    ):
        raise ConfigError(
            f"{path}: layer_range must be a list of two whole numbers, got {in_short(layers)}; leave it out"
        )
    return MergedModel(
        model=_name(path, entry["model"]), parameters=_parameters(path, entry.get("parameters")), layer_range=layers
    )


def _name(path: Path, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{path}: a model must be a directory or Hub id, got {in_short(name)}")
    if "+" in name and not Path(name).exists():
        raise ConfigError(
            f"{path}: a model must be whole, got {name} with a LoRA; merge the adapter into it first (peft's merge_and_unload)"
        )
    return name


def _parameters(path: Path, found: Any) -> dict[str, Setting]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: parameters must be keys with values, got {in_short(found)}")
    return dict(found)
