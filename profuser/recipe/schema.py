"""The recipe as nested dataclasses. Every command shares them, and each checks its own values.

The text under a field is what `--help` and the documentation print. Defaults that FuseLLM and FuseChat used are marked
"FuseLLM's": the ProFuser paper publishes no optimiser settings, no top-k, no temperature and no beta. `parse.py` reads a
recipe from YAML and the command line, `schedule.py` says what the named schedules are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from profuser.errors import ConfigError
from profuser.kernels.tails import BUCKET, RENORMALIZE, Tail
from profuser.recipe.places import is_path

ScheduleName = Literal["progressive", "simultaneous", "reverse", "fusellm", "sft"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

Split = Literal["train", "validation", "heldout"]
SPLITS: tuple[Split, ...] = get_args(Split)

RESERVED_NAMES = {"target", "target_before", "fused", "none", "mean"}
"""Names that scores and summaries use beside the sources'."""

LARGEST = 2**63


def check_positive(group: str, config: object, *names: str) -> None:
    """Raises ConfigError unless these fields of a group of keys are positive and finite; None is left alone."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < LARGEST:
            raise ConfigError(f"{group}.{name} must be > 0 and finite, got {value}; set a positive number")


def check_not_negative(group: str, config: object, *names: str) -> None:
    """Raises ConfigError unless these fields are 0 or positive."""
    for name in names:
        value = getattr(config, name)
        if not 0 <= value < LARGEST:
            key = f"{group}.{name}" if group else name
            raise ConfigError(f"{key} must be >= 0 and below 2**63, got {value}; set 0 or a positive number")


def check_names(key: str, names: Sequence[str]) -> None:
    """Raises ConfigError unless the names can stand in file names, and no two are the same."""
    for name in names:
        if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
            raise ConfigError(f"{key}: a name may hold letters, digits, - _ and . only, got {name!r}; rename it")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{key}: names must differ, got {twice[0]!r} twice; rename one")


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
    """Column of the prompts."""
    response_column: str = "response"
    """Column of the ground truth."""
    skill_column: str | None = "skill"
    """Column that groups the examples in tables; a data set without it is one group, "all"."""
    limit: int | None = None
    """Use only the first so many training examples."""
    max_length: int = 2048
    """Longest sequence in tokens, prompt and response together (FuseLLM's)."""

    def __post_init__(self) -> None:
        check_positive("data", self, "max_length", "limit")

    def location(self, split: Split) -> str | None:
        """The file or data set of a split; None where the recipe has no such split."""
        return getattr(self, split)


@dataclass(kw_only=True)
class GenerationConfig:
    """How every source answers the training prompts (inference mode) and the held-out ones."""

    responses_per_source: int = 1
    """Responses that each source gives to a training prompt; more than one needs a temperature."""
    max_new_tokens: int = 512
    """Longest response in tokens; one that is not finished by then does not take part in the vote."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    """Share of the probability that is sampled from; 1 keeps all tokens."""
    batch_size: int = 16
    """Prompts answered at a time."""

    def __post_init__(self) -> None:
        check_positive("generation", self, "max_new_tokens", "batch_size", "responses_per_source", "top_p")
        check_not_negative("generation", self, "temperature")
        if self.top_p > 1:
            raise ConfigError(f"generation.top_p must be <= 1, got {self.top_p}; 1 keeps all tokens")
        if self.responses_per_source > 1 and self.temperature == 0:
            raise ConfigError(
                f"generation.responses_per_source > 1 needs a temperature > 0 (greedy responses are equal), got "
                f"{self.responses_per_source} at 0; set generation.temperature"
            )


@dataclass(kw_only=True)
class JudgeConfig:
    """One voter of the inference mode: a reward model or a function."""

    name: str
    """Short unique name, used in the store and the report."""
    model: str | None = None
    """Directory or Hub id of an AutoModelForSequenceClassification with one output, or demo:NAME."""
    function: str | None = None
    """`module:function` with `function(example, responses) -> scores`, one score per response, NaN = abstain."""
    batch_size: int = 32
    """Responses that a reward model scores at a time."""
    trust_remote_code: bool = False
    """Run model code from the model's repository."""


@dataclass(kw_only=True)
class CaptureConfig:
    """What is stored of a source's distributions."""

    top_k: int = 10
    """Kept entries per position (FuseLLM's)."""
    batch_size: int = 8
    """Responses that a source scores at a time."""
    shard_size: int = 4096
    """Examples per shard; a shard is the unit of resumption."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the sources. auto is bfloat16 on CUDA and float32 on the CPU, settled when a store is begun."""

    def __post_init__(self) -> None:
        check_positive("capture", self, "top_k", "batch_size", "shard_size")


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

    def __post_init__(self) -> None:
        if not 0 <= self.min_reliability <= 1:
            raise ConfigError(f"align.min_reliability must be in [0, 1], got {self.min_reliability}; default 0.1")


@dataclass(kw_only=True)
class StageConfig:
    """One stage of a schedule: L = inference_weight * L_inference + training_weight * L_training."""

    inference_weight: float = 0.0
    """Weight of the inference mode: the voted winner's response and its distributions."""
    training_weight: float = 0.0
    """Weight of the training mode: the ground truth and the distributions of the source that Min-CE chose."""
    beta: float | None = None
    """KD weight of this stage; null = optim.beta."""
    share: float = 1.0
    """Share of optim's steps or epochs, relative to the other stages'."""

    def check(self, name: str) -> None:
        """Raises ConfigError for a stage that weighs nothing; `name` is its place in the recipe."""
        infer, train = self.inference_weight, self.training_weight
        if infer < 0 or train < 0 or infer + train == 0:
            raise ConfigError(
                f"{name} must have a positive inference_weight or training_weight, got {infer:g} and {train:g}; set one"
            )
        if not (self.share > 0 and math.isfinite(self.share)):
            raise ConfigError(f"{name}.share must be > 0 and finite, got {self.share:g}; remove the stage instead")
        if self.beta is not None and not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ConfigError(f"{name}.beta must be >= 0 and finite, got {self.beta:g}; 0 turns KD off")


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
    """AdamW's, for matrices only (FuseLLM's)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's (FuseLLM's)."""
    grad_clip: float = 1.0
    """Largest norm of the gradient (FuseLLM's)."""
    batch_size: int = 128
    """Instructions per optimizer step, over all ranks (FuseLLM's)."""
    micro_batch_size: int = 8
    """Instructions per forward pass of one rank."""
    epochs: float = 3.0
    """Passes over the training instructions, all stages together (the paper's three)."""
    steps: int | None = None
    """Optimizer steps, all stages together; overrides epochs."""
    beta: float = 0.1 / 0.9
    """KD weight (from FuseLLM's CE weight of 0.9)."""
    temperature: float = 1.0
    """Temperature of the KL; other than 1 needs tail: renormalize."""
    tail: Tail = BUCKET
    """What the mass outside the kept entries does: it is matched as one bucket, or divided out."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the target. auto is bf16 on CUDA and fp32 on the CPU, settled when a run is begun."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, which saves memory and costs a forward pass."""
    eval_every: int = 100
    """Steps between evaluations of CE and KD on data.validation; 0 = at the ends of stages only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 = only on interruption."""
    keep_checkpoints: int = 2
    """Newest checkpoints that are kept."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    data_workers: int = 1
    """Processes that prepare the next batches while one is trained on; 0 = none, in between the steps."""

    def __post_init__(self) -> None:
        check_positive(
            "optim", self, "batch_size", "micro_batch_size", "lr", "epochs", "grad_clip", "temperature", "log_every",
            "keep_checkpoints",
        )  # fmt: skip
        check_not_negative(
            "optim", self, "beta", "weight_decay", "warmup_ratio", "min_lr_ratio", "eval_every", "checkpoint_every",
            "data_workers",
        )  # fmt: skip
        for name in ("warmup_ratio", "min_lr_ratio"):
            if (share := getattr(self, name)) > 1:
                raise ConfigError(f"optim.{name} is a share and must be <= 1, got {share}; give a share")
        if not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"optim.betas must be in [0, 1), got {list(self.betas)}; default [0.9, 0.95]")
        if self.steps is not None and self.steps < 1:
            raise ConfigError(f"optim.steps must be >= 1 or null, got {self.steps}; remove it to train by epochs")
        if self.temperature != 1 and self.tail == BUCKET:
            raise ConfigError(
                f"optim.temperature must be 1 with tail: {BUCKET} (a tail of many tokens has no temperature), got "
                f"{self.temperature:g}; set optim.tail: {RENORMALIZE}"
            )


@dataclass(kw_only=True)
class EvaluationConfig:
    """Held-out scores."""

    match: str | None = None
    """`module:function` with `function(example, response) -> bool`; null = the ground truth's text is contained."""
    examples: int = 6
    """Held-out prompts shown side by side in the report."""

    def __post_init__(self) -> None:
        check_not_negative("evaluation", self, "examples")


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
    """Voters of the inference mode; without any the schedule must not use it."""
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    schedule: ScheduleName | list[StageConfig] = "progressive"
    """A named schedule, or its stages spelt out."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    store: str | None = None
    """Directory of the prepared targets; null = runs/NAME-store with the recipe's name."""
    output: str | None = None
    """Run directory; null = runs/NAME."""
    seed: int = 0
    """Decides the order of the data, sampled responses and what else is random."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ConfigError(
                "sources must name at least one model, got an empty list; add `- {name: ..., model: ...}`"
            )
        check_names("sources", names)
        check_names("judges", [judge.name for judge in self.judges])
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
        check_not_negative("", self, "seed")
        if isinstance(self.schedule, list):
            if not self.schedule:
                raise ConfigError(f"schedule must have at least one stage, got []; name one of {', '.join(SCHEDULES)}")
            for i, stage in enumerate(self.schedule):
                stage.check(f"schedule[{i}]")

    @property
    def target_config(self) -> SourceConfig:
        """The target as a model: one of the sources, or one of its own."""
        by_name = {source.name: source for source in self.sources}
        return by_name.get(self.target) or SourceConfig(name="target", model=self.target)

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe as nested plain values, defaults included."""
        return asdict(self)
