"""The recipe: nested dataclasses, read from YAML with dotted overrides on the command line (jsonargparse).

Every command shares the same keys; an unknown one is an error. Defaults that FuseLLM/FuseChat used are marked
"FuseLLM's"; the ProFuser paper publishes no optimiser settings, top-k, temperature or beta.
"""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import jsonargparse
import yaml

from profuser.errors import ConfigError

jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the texts under the fields are --help's

PACKAGE_DIR = Path(__file__).resolve().parent
RECIPES_DIR = PACKAGE_DIR / "recipes"
DEFAULT_RECIPE = RECIPES_DIR / "demo.yaml"
BUNDLED_PREFIX = "demo:"
"""`demo:NAME` in a recipe names a file or folder of the bundled demo, wherever profuser is installed."""

FILES = {".jsonl", ".json", ".csv", ".parquet", ".gguf"}
"""Suffixes of what is never a Hub id."""

RESERVED_NAMES = {"target", "target_before", "fused", "none", "mean"}
"""Names that scores and summaries use beside the sources'."""

FREE_KEYS = (
    "optim.micro_batch_size", "optim.gradient_checkpointing", "optim.log_every", "optim.eval_every", "optim.checkpoint_every",
    "optim.keep_checkpoints", "capture.batch_size", "generation.batch_size", "evaluation",
)  # fmt: skip
"""Keys that may change between a run and its resumption: they decide how it is computed or shown, not what comes out."""

LARGEST = 2**63

SCHEDULES = ("progressive", "simultaneous", "reverse", "fusellm", "sft")


@dataclass(kw_only=True)
class SourceConfig:
    """One source model."""

    name: str
    """Short unique name, used in the store, the report and `target`."""
    model: str
    """Directory, Hub id, or demo:NAME for a bundled model."""
    revision: str | None = None
    """Hub revision."""
    chat_template: str | None = None
    """Jinja chat template (or a path to a .jinja file) for a tokenizer that brings none."""
    trust_remote_code: bool = False
    """Run model code from the model's repository."""


@dataclass(kw_only=True)
class DataConfig:
    """Instructions with ground truth: JSONL, JSON, CSV or Parquet files, or Hub dataset ids."""

    train: str
    """What is fused on."""
    heldout: str | None = None
    """Prompts that are read once, for the final scores; without them nothing is scored."""
    validation: str | None = None
    """Prompts whose CE and KD are followed during training (the held-out ones are not)."""
    prompt_column: str = "prompt"
    response_column: str = "response"
    skill_column: str | None = "skill"
    """Column that groups the examples in tables; a data set without it is one group, "all"."""
    limit: int | None = None
    """Use only the first so many training examples."""
    max_length: int = 2048
    """Longest sequence in tokens, prompt and response together (FuseLLM's)."""


@dataclass(kw_only=True)
class GenerationConfig:
    """How every source answers the training prompts (inference mode) and the held-out ones."""

    responses_per_source: int = 1
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 = greedy."""
    top_p: float = 1.0
    batch_size: int = 16


@dataclass(kw_only=True)
class JudgeConfig:
    """One voter of the inference mode: a reward model or a function."""

    name: str
    model: str | None = None
    """Directory or Hub id of an AutoModelForSequenceClassification with one output, or demo:NAME."""
    function: str | None = None
    """`module:function` with `function(example, responses) -> scores`, one score a response, NaN = abstain."""
    batch_size: int = 32
    trust_remote_code: bool = False


@dataclass(kw_only=True)
class CaptureConfig:
    """What is stored of a source's distributions."""

    top_k: int = 10
    """Kept entries a position (FuseLLM's)."""
    batch_size: int = 8
    shard_size: int = 4096
    """Examples a shard; a shard is the unit of resumption."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the sources: auto = bfloat16 on CUDA, float32 on the CPU."""


@dataclass(kw_only=True)
class AlignConfig:
    """How a source's distributions reach the target's vocabulary."""

    mode: Literal["bytes", "fusellm"] = "bytes"
    """bytes: exact, by what the target's tokenizer does; fusellm: FuseLLM's dynamic time warping on token strings."""
    fallback: Literal["skip", "label"] = "skip"
    """fusellm only: a position that it does not match says nothing, or puts all mass on the label."""
    min_reliability: float = 0.1
    """Positions where less of the source's mass can follow the target's prefix are skipped."""
    min_ce_unit: Literal["token", "byte"] = "byte"
    """Training mode compares nats per byte of the response, or per own token as the paper does."""


@dataclass(kw_only=True)
class StageConfig:
    """One stage of a schedule: L = infer_weight * L_infer + train_weight * L_train."""

    infer_weight: float = 0.0
    train_weight: float = 0.0
    beta: float | None = None
    """KD weight of this stage; null = optim.beta."""
    share: float = 1.0
    """Share of optim's steps or epochs, relative to the other stages'."""


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a cosine learning rate and warm-up, restarted in every stage."""

    lr: float = 1e-5
    """Peak learning rate (FuseLLM's)."""
    min_lr_ratio: float = 0.0
    """The cosine ends at this share of lr."""
    warmup_ratio: float = 0.008
    """Share of a stage's steps (FuseLLM's)."""
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    grad_clip: float = 1.0
    batch_size: int = 128
    """Instructions an optimizer step, over all ranks (FuseLLM's)."""
    micro_batch_size: int = 8
    """Instructions a forward pass of one rank."""
    epochs: float = 3.0
    """Passes over the training instructions, all stages together (the paper's three)."""
    steps: int | None = None
    """Optimizer steps, all stages together; overrides epochs."""
    beta: float = 0.1 / 0.9
    """KD weight (from FuseLLM's CE weight of 0.9)."""
    temperature: float = 1.0
    """Other than 1 needs tail: renormalize."""
    tail: Literal["bucket", "renormalize"] = "bucket"
    """What the mass outside the kept entries does."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto = bf16 on CUDA, fp32 on the CPU."""
    gradient_checkpointing: bool = False
    eval_every: int = 100
    """Steps between evaluations of CE and KD on data.validation; 0 = at the ends of stages only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 = only on interruption."""
    keep_checkpoints: int = 2
    log_every: int = 10


@dataclass(kw_only=True)
class EvaluationConfig:
    """Held-out scores."""

    match: str | None = None
    """`module:function` with `function(example, response) -> bool`; null = the ground truth's text is contained."""
    examples: int = 6
    """Held-out prompts shown side by side in the report."""


@dataclass(kw_only=True)
class Recipe:
    """Everything that decides the outcome of a run."""

    sources: list[SourceConfig]
    """The models to be fused."""
    target: str
    """A source's name (it is fused into), or another model (directory or Hub id)."""
    data: DataConfig
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    judges: list[JudgeConfig] = field(default_factory=list)
    """Voters of the inference mode; none = the schedule must not use it."""
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    schedule: Literal["progressive", "simultaneous", "reverse", "fusellm", "sft"] | list[StageConfig] = "progressive"
    """A named schedule, or its stages spelt out."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    store: str | None = None
    """Directory of the prepared targets; null = runs/NAME-store with the recipe's name."""
    output: str | None = None
    """Run directory; null = runs/NAME."""
    seed: int = 0

    def __post_init__(self) -> None:
        names = [s.name for s in self.sources]
        if not names:
            raise ConfigError(
                "sources must name at least one model, got an empty list; add `- {name: ..., model: ...}`"
            )
        for kind, given in (("sources", names), ("judges", [j.name for j in self.judges])):
            for name in given:
                if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
                    raise ConfigError(
                        f"{kind}: a name may hold letters, digits, - _ and . only, got {name!r}; rename it"
                    )
            if twice := {n for n in given if given.count(n) > 1}:
                raise ConfigError(f"{kind}: names must differ, got {sorted(twice)[0]!r} twice; rename one")
        if taken := sorted(set(names) & RESERVED_NAMES):
            raise ConfigError(
                f"sources: a name must not be one of {', '.join(sorted(RESERVED_NAMES))}, got {taken[0]!r}; rename it"
            )
        if self.target not in names and not is_path(self.target) and "/" not in self.target:
            raise ConfigError(
                f"target must be a source's name or a model, got {self.target!r} (sources: {', '.join(names)}); fix target"
            )
        for judge in self.judges:
            if (judge.model is None) == (judge.function is None):
                raise ConfigError(f"judges: {judge.name} must have either model or function; set exactly one")
        positive = {
            "data.max_length": self.data.max_length,
            "generation.max_new_tokens": self.generation.max_new_tokens,
            "generation.batch_size": self.generation.batch_size,
            "generation.responses_per_source": self.generation.responses_per_source,
            "capture.top_k": self.capture.top_k,
            "capture.batch_size": self.capture.batch_size,
            "capture.shard_size": self.capture.shard_size,
            "optim.batch_size": self.optim.batch_size,
            "optim.micro_batch_size": self.optim.micro_batch_size,
            "optim.lr": self.optim.lr,
            "optim.epochs": self.optim.epochs,
            "optim.grad_clip": self.optim.grad_clip,
            "optim.temperature": self.optim.temperature,
            "optim.log_every": self.optim.log_every,
            "optim.keep_checkpoints": self.optim.keep_checkpoints,
            "generation.top_p": self.generation.top_p,
            **({} if self.data.limit is None else {"data.limit": self.data.limit}),
        }
        for key, value in positive.items():
            if not 0 < value < LARGEST:
                raise ConfigError(f"{key} must be > 0 and finite, got {value}; set a positive number")
        not_negative = {
            "optim.beta": self.optim.beta,
            "optim.weight_decay": self.optim.weight_decay,
            "optim.warmup_ratio": self.optim.warmup_ratio,
            "optim.min_lr_ratio": self.optim.min_lr_ratio,
            "optim.eval_every": self.optim.eval_every,
            "optim.checkpoint_every": self.optim.checkpoint_every,
            "generation.temperature": self.generation.temperature,
            "evaluation.examples": self.evaluation.examples,
            "seed": self.seed,
        }
        for key, value in not_negative.items():
            if not 0 <= value < LARGEST:
                raise ConfigError(f"{key} must be >= 0 and below 2**63, got {value}; set 0 or a positive number")
        for key in ("warmup_ratio", "min_lr_ratio"):
            if getattr(self.optim, key) > 1:
                raise ConfigError(
                    f"optim.{key} is a share and must be <= 1, got {getattr(self.optim, key)}; give a share"
                )
        if self.generation.top_p > 1:
            raise ConfigError(f"generation.top_p must be <= 1, got {self.generation.top_p}; 1 keeps all tokens")
        if not all(0 <= b < 1 for b in self.optim.betas):
            raise ConfigError(f"optim.betas must be in [0, 1), got {list(self.optim.betas)}; default [0.9, 0.95]")
        if self.generation.responses_per_source > 1 and self.generation.temperature == 0:
            raise ConfigError(
                f"generation.responses_per_source > 1 needs a temperature > 0 (greedy responses are equal), got "
                f"{self.generation.responses_per_source} at 0; set generation.temperature"
            )
        if self.optim.steps is not None and self.optim.steps < 1:
            raise ConfigError(f"optim.steps must be >= 1 or null, got {self.optim.steps}; remove it to train by epochs")
        if self.optim.temperature != 1 and self.optim.tail == "bucket":
            raise ConfigError(
                f"optim.temperature must be 1 with tail: bucket (a tail of many tokens has no temperature), got "
                f"{self.optim.temperature:g}; set optim.tail: renormalize"
            )
        if not 0 <= self.align.min_reliability <= 1:
            raise ConfigError(f"align.min_reliability must be in [0, 1], got {self.align.min_reliability}; default 0.1")
        if isinstance(self.schedule, list):
            if not self.schedule:
                raise ConfigError(f"schedule must have at least one stage, got []; name one of {', '.join(SCHEDULES)}")
            for i, stage in enumerate(self.schedule):
                if stage.infer_weight < 0 or stage.train_weight < 0 or stage.infer_weight + stage.train_weight == 0:
                    raise ConfigError(
                        f"schedule[{i}] must have a positive infer_weight or train_weight, got {stage.infer_weight:g} and "
                        f"{stage.train_weight:g}; set one"
                    )
                if not (stage.share > 0 and math.isfinite(stage.share)):
                    raise ConfigError(
                        f"schedule[{i}].share must be > 0 and finite, got {stage.share:g}; remove the stage instead"
                    )
                if stage.beta is not None and not (stage.beta >= 0 and math.isfinite(stage.beta)):
                    raise ConfigError(f"schedule[{i}].beta must be >= 0 and finite, got {stage.beta:g}; 0 turns KD off")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(kw_only=True)
class Run:
    """A recipe with the options of one command."""

    recipe: Recipe
    name: str
    options: dict[str, Any]

    @property
    def store_dir(self) -> Path:
        return Path(self.recipe.store or f"runs/{self.name}-store")

    @property
    def output_dir(self) -> Path:
        return Path(self.recipe.output or f"runs/{self.name}")


def is_path(model: str) -> bool:
    """Whether a model string means a local directory, and is therefore never looked up on the Hub."""
    looks_local = model.startswith((BUNDLED_PREFIX, "/", ".", "~")) or model.count("/") > 1 or "\\" in model
    in_folder = "/" in model and Path(model).parent.is_dir()
    return looks_local or in_folder or Path(model).suffix in FILES or Path(model).exists()


def resolve(location: str) -> str:
    """A path or Hub id with `demo:NAME` replaced by the bundled file's place."""
    if not location.startswith(BUNDLED_PREFIX):
        return str(Path(location).expanduser()) if is_path(location) else location
    name = location.removeprefix(BUNDLED_PREFIX)
    demo = PACKAGE_DIR / "demo"
    folder = "data" if "." in name else "models"
    path = (demo / folder / name).resolve()
    if not path.is_relative_to(demo):
        raise ConfigError(
            f"{BUNDLED_PREFIX}NAME must stay inside the bundled demo, got {location!r}; give a plain path"
        )
    return str(path)


def target_config(recipe: Recipe) -> SourceConfig:
    """The target as a model: one of the sources, or one of its own."""
    by_name = {s.name: s for s in recipe.sources}
    return by_name.get(recipe.target) or SourceConfig(name="target", model=recipe.target)


def load_recipe(record: dict[str, Any]) -> Recipe:
    """The recipe of a run.json."""
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe, None, as_group=False)
    try:
        values = parser.instantiate(parser.parse_object(record))
    except jsonargparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error), "run.json")) from None
    return Recipe(**{k: getattr(values, k) for k in Recipe.__dataclass_fields__})


def parse_run(command: str, argv: list[str] | None, flags: dict[str, str], description: str) -> Run:
    """Command line → recipe. `flags` are the command's own switches with their help.

    Raises:
        ConfigError: an unknown key, a wrong type, a missing key, a contradiction.
    """
    parser = jsonargparse.ArgumentParser(
        prog=f"python -m profuser.{command}", description=description, exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="recipe (YAML); without it the bundled demo's")
    for flag, text in flags.items():
        parser.add_argument(f"--{flag}", action="store_true", help=text)
    parser.add_class_arguments(Recipe, None, as_group=False)
    argv = list(argv)
    config = next(
        (a.split("=", 1)[1] if "=" in a else b for a, b in zip(argv, [*argv[1:], ""]) if a.split("=")[0] == "--config"),
        None,
    )
    if argv and not argv[0].startswith("-"):
        raise ConfigError(f"a recipe is given as --config {argv[0]}, got {argv[0]} alone; add --config")
    if config is None:
        config, argv = str(DEFAULT_RECIPE), ["--config", str(DEFAULT_RECIPE), *argv]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            namespace = parser.instantiate(parser.parse_args(argv))
    except (
        jsonargparse.ArgumentError,
        TypeError,
        AttributeError,
    ) as error:  # the latter for a group that is no mapping
        raise ConfigError(_one_line(str(error), config)) from None
    values = {k: getattr(namespace, k) for k in Recipe.__dataclass_fields__}
    return Run(
        recipe=Recipe(**values),
        name=Path(config).stem,
        options={flag: getattr(namespace, flag.replace("-", "_")) for flag in flags},
    )


def _one_line(message: str, config: str) -> str:
    """jsonargparse's message as rule, value and fix."""
    if wrong := _no_mapping(config):
        return f"{wrong} (recipe: {config}; `--help` lists every key)"
    key = found[1] if (found := re.match(r'Parser key "([^"]+)"', message)) else None
    value = re.split(r"(?:Given|Got) value: ", message)[-1].strip()
    types = dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message))
    message = "; ".join(line.strip() for line in message.splitlines() if line.strip())
    inner = re.search(r"class_path 'profuser\.config\.(\w+)'.*Option '(\w+)' is not accepted", message)
    if inner:
        known = ", ".join(f.name for f in fields(globals()[inner[1]]))
        message = f"a key of an entry of {key} must be one of {known}; got {inner[2]}"
    elif key == "schedule":
        message = f"schedule must be one of {', '.join(SCHEDULES)} or a list of stages, got {value}"
    elif key == "config":
        return f"--config must be an existing recipe, got {config}; fix the path"
    elif key and types:
        message = f"{key} must be {' or '.join(t.replace('NoneType', 'null') for t in types)}, got {value}"
    elif found := re.match(r"unrecognized arguments: (?:--)?([^\s=]+)", message):
        message = _unknown_key(found[1])
    elif found := re.match(r"Group '([^']+)' does not accept option '([^']+)'", message):
        message = _unknown_key(f"{found[1]}.{found[2]}")
    elif found := re.match(r"Option '([^']+)' is not accepted", message):
        message = _unknown_key(found[1])
    elif found := re.match(r"Problems parsing config: (.*)", message):
        at = re.sub(r" in \"<unicode string>\",", "", found[1])
        message = f"the recipe must be YAML, got: {at}"
    return f"{message} (recipe: {config}; `--help` lists every key)"


def _no_mapping(config: str) -> str | None:
    """What is wrong with a recipe, or a group of its keys, that is a list, a text or nothing."""
    try:
        content = yaml.safe_load(Path(config).read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(content, dict):
        return f"a recipe must be a mapping of keys such as sources and target, got {type(content).__name__}"
    groups = [name for name, kind in get_type_hints(Recipe).items() if is_dataclass(kind) and name in content]
    wrong = [name for name in groups if not isinstance(content[name], dict)]
    return f"{wrong[0]} must be a mapping of its keys, got {content[wrong[0]]!r}" if wrong else None


def _unknown_key(key: str) -> str:
    """Names the keys beside the one that does not exist."""
    group, _, name = key.rpartition(".")
    of: Any = Recipe
    for part in group.split(".") if group else ():
        of = get_type_hints(of).get(part, Recipe)
    known = ", ".join([*(() if group else ("config",)), *(f.name for f in fields(of))]) if is_dataclass(of) else ""
    return f"a key of {group or 'the recipe'} must be one of {known}; got {name}"


def differing_keys(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two resolved recipes differ."""
    keys = []
    for key in sorted(set(a) | set(b)):
        x, y = a.get(key), b.get(key)
        if isinstance(x, dict) and isinstance(y, dict):
            keys += differing_keys(x, y, f"{prefix}{key}.")
        elif _plain(x) != _plain(y):
            keys.append(f"{prefix}{key}")
    return keys


def deciding_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The differing keys that decide the outcome of a run."""
    return [
        key for key in differing_keys(a, b) if not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]


def _plain(value: Any) -> Any:
    """JSON's view of a value: tuples are lists."""
    return yaml.safe_load(yaml.safe_dump(value)) if not isinstance(value, tuple) else list(value)
