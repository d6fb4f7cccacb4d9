"""The recipe as nested dataclasses. Every command uses them, and each dataclass checks its own values.

The text under a field is printed by `--help` and in docs/recipe.md. The words "FuseLLM's value" mark a default that FuseLLM
and FuseChat used: the ProFuser paper publishes no optimiser settings, no top-k, no temperature and no beta. `parse.py` reads
a recipe from YAML and the command line; `schedule.py` defines the named schedules.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from profuser.errors import ConfigError
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.checks import LARGEST, check_date, check_names, check_not_negative, check_positive
from profuser.recipe.data import DataConfig
from profuser.recipe.generation import WITH_PYTHON, GenerationConfig, Reasoning, SourceGenerationConfig
from profuser.recipe.optim import OptimConfig
from profuser.recipe.places import is_path
from profuser.recipe.rubric import RubricConfig
from profuser.recipe.server import ServerConfig

ScheduleName = Literal["progressive", "simultaneous", "reverse", "fusellm", "sft"]
SCHEDULES: tuple[str, ...] = get_args(ScheduleName)

Grader = Literal["exact", "number", "maths", "reasoning_gym"]

VoteRule = Literal["majority", "borda", "mean_z"]

Choice = Literal["min_ce", "route", "weights"]

RESERVED_NAMES = {"target", "target_before", "fused", "none", "mean"}
"""Names that no source may have, because scores and summaries use them for something else."""

MOST_SOURCES = 63
"""How many sources a recipe may have: a token of the targets has a bit for each (store/marks.py)."""


@dataclass(kw_only=True)
class SourceConfig:
    """One source, a model that is fused."""

    name: str
    """A short, unique name that is used in the store, in the report and by `target`."""
    model: str
    """The model's directory, its Hub id, or demo:NAME for a bundled model. It may be the directory of a peft adapter, which is merged into
    its base."""
    base: str | None = None
    """The base of an adapter: a directory or Hub id. null takes the one that its adapter_config.json names."""
    revision: str | None = None
    """The revision of a Hub model: a branch, a tag or a commit."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of a .jinja file. It is needed where the tokenizer has none, and replaces one it has."""
    trust_remote_code: bool = False
    """Whether Python code from the model's repository may be run."""
    device_map: Literal["auto"] | None = None
    """auto spreads the source over all GPUs, for one that does not fit on one; null puts it on the first. Without a GPU it changes nothing,
    and the target is never spread while it is trained."""
    reasoning: Reasoning | None = None
    """What becomes of the reasoning before this source's answers; null takes generation.reasoning."""
    responses: str | None = None
    """A file with this source's responses, which it is then not asked for: rows with `prompt`, `response` and, optionally, `finished` and
    `left_out`."""
    logprobs: str | None = None
    """A file, or a pattern of files, with the top-k log-probabilities of this source's tokens, for which it is then not run: rows with
    `prompt`, `response` and what docs/data.md lists."""
    server: str | ServerConfig | None = None
    """An OpenAI-compatible server that answers for this source, by its URL or with what else is to be said of it. `model` still has to be
    there, which the distributions come from; the server must run the same one."""
    generation: SourceGenerationConfig | None = None
    """How this source answers, where that differs from the recipe's `generation`."""

    def __post_init__(self) -> None:
        if isinstance(self.server, str):
            self.server = ServerConfig(url=self.server)
        if isinstance(self.server, ServerConfig):
            self.server.check(f"sources: {self.name}: server")
        if self.generation is not None:
            self.generation.check(f"sources: {self.name}: generation")
        engine = None if self.generation is None else self.generation.engine
        if self.server is not None and engine not in (None, "server"):
            raise ConfigError(
                f"sources: {self.name}: generation.engine must be server where the source has a server, got {engine}; take one of "
                "them out"
            )

    @property
    def generation_changes(self) -> dict[str, Any]:
        """What this source does otherwise than the recipe's `generation` says, by the key there."""
        said = {} if self.generation is None else self.generation.said
        return said if self.server is None else said | {"engine": "server"}


JUDGES = ("model", "function", "grader", "server", "scores")
"""What a judge may be, by the keys of JudgeConfig."""


@dataclass(kw_only=True)
class JudgeConfig:
    """One judge of the inference mode. It has one vote, and is a reward model, a function, a grader, a model on a server or a file of
    scores."""

    name: str
    """A short, unique name that is used in the store and in the report."""
    model: str | None = None
    """The directory or Hub id of an AutoModelForSequenceClassification with one output, or demo:NAME for a bundled one. It may be the
    directory of a peft adapter, which is merged into its base."""
    base: str | None = None
    """The base of an adapter: a directory or Hub id. null takes the one that its adapter_config.json names."""
    function: str | None = None
    """A function as `module:function`. `function(example, responses)` returns one score per response, NaN to abstain."""
    grader: Grader | None = None
    """What compares a response's answer with the column `answer` or the ground truth: exact as texts, number as numbers, maths by the
    package math-verify, reasoning_gym by the task's own score."""
    server: str | ServerConfig | None = None
    """An OpenAI-compatible server whose model judges, by its URL or with what else is to be said of it."""
    rubric: RubricConfig | None = None
    """What the model on the server is asked; null takes a rubric of our own, with scores from 1 to 10."""
    scores: str | None = None
    """A file with this judge's scores, such as those of people: rows with `prompt`, `response` and `score`, of which null abstains; or with
    their preferences: `prompt`, `chosen` and `rejected`."""
    chat_template: str | None = None
    """A Jinja chat template, or the path of a .jinja file, for a reward model whose tokenizer has none, or to replace its own."""
    floor: float | None = None
    """A response that this judge scores below its floor cannot win, whatever the other judges say; null sets none."""
    batch_size: int = 32
    """How many responses a reward model scores at a time."""
    trust_remote_code: bool = False
    """Whether Python code from the model's repository may be run."""

    def __post_init__(self) -> None:
        if self.batch_size <= 0:
            raise ConfigError(
                f"judges: {self.name}: batch_size must be > 0, got {self.batch_size}; set a positive number"
            )
        if self.floor is not None and not abs(self.floor) < LARGEST:
            raise ConfigError(
                f"judges: {self.name}: floor must be finite and its size below 2**63, got {self.floor:g}; null sets none"
            )
        if isinstance(self.server, str):
            self.server = ServerConfig(url=self.server)
        if isinstance(self.server, ServerConfig):
            self.server.check(f"judges: {self.name}: server")
        if self.rubric is not None:
            self.rubric.check(f"judges: {self.name}: rubric")
            if self.server is None:
                raise ConfigError(
                    f"judges: {self.name}: rubric is for a judge on a server; take it out, or add `server`"
                )
        if self.base is not None and self.model is None:
            raise ConfigError(f"judges: {self.name}: base is for a reward model, no other judge has one; take it out")
        if self.chat_template is not None and self.model is None:
            raise ConfigError(
                f"judges: {self.name}: chat_template is for a reward model, no other judge has one; take it out"
            )


@dataclass(kw_only=True)
class JudgingConfig:
    """How the scores of the judges decide which response wins, and what that leads to."""

    rule: VoteRule = "majority"
    """majority: each judge votes for its best response, as in the paper. borda: it gives every response the share of the others that it
    scores lower. mean_z: the mean of the judges' standardised scores decides."""
    no_signal: Literal["skip", "ground_truth"] = "skip"
    """What inference mode teaches on a prompt where no judge prefers any response: nothing, or the ground truth as in training mode."""


@dataclass(kw_only=True)
class CaptureConfig:
    """How the sources score a response, and what of their distributions is stored."""

    choice: Choice = "min_ce"
    """Which source an example is learnt from. min_ce: in training mode the one with the lowest cross-entropy on the ground truth, in
    inference mode the one whose response wins the vote. route: in both the one that data.route_column names, and no other is asked.
    weights: in training mode all of them, as much as data.weights_column says of each; in inference mode as with min_ce."""
    top_k: int = 10
    """How many entries of a distribution are stored per position (FuseLLM's value)."""
    batch_size: int = 8
    """The most responses that a source scores at a time. Where its memory does not suffice for so many, it takes half of them, and says
    so."""
    tokens_per_batch: int | None = None
    """The most tokens, padding included, that a source scores at a time, in place of batch_size: of short responses it then takes more, of
    long ones fewer, at least one. Where its memory does not suffice for so many, it takes half of them, and says so. null counts
    responses."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """How the responses of tokens_per_batch lie in a forward pass. packed: end to end, and none sees another; a source whose architecture
    would let it is padded, and says so. auto packs where flash-attention is used, which computes nothing between responses, and pads
    elsewhere: responses of similar length lie together, so that little is padding, and a mask of blocks costs what it saves."""
    shard_size: int = 4096
    """About how many examples a shard of the store holds: those whose prompts have a certain hash. An interrupted preparation goes on with
    the next shard, and where rows of the data change, only their shards are made again."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """The arithmetic of the sources. auto means bfloat16 on CUDA and float32 on the CPU; it is settled when a store is begun."""

    def __post_init__(self) -> None:
        check_positive("capture", self, "top_k", "batch_size", "tokens_per_batch", "shard_size")
        if self.layout == "packed" and self.tokens_per_batch is None:
            raise ConfigError(
                "capture.layout: packed needs a budget of tokens, capture.tokens_per_batch is null; set it, or leave layout out"
            )

    @property
    def may_pack(self) -> bool:
        """Whether responses are laid end to end where a source's attention suits it."""
        return self.tokens_per_batch is not None and self.layout != "padded"

    def responses_at_once(self, length: float) -> int:
        """Returns how many responses of a length a source scores at a time, of which a shard has no more than its examples."""
        fitting = self.batch_size
        if self.tokens_per_batch is not None:
            fitting = max(1, int(self.tokens_per_batch / max(length, 1)))
        return min(fitting, self.shard_size)


@dataclass(kw_only=True)
class AlignConfig:
    """How the sources' distributions are put on the target's tokens, and how Min-CE compares the sources."""

    mode: Literal["bytes", "fusellm"] = "bytes"
    """bytes compares the tokens' bytes and is exact; fusellm is FuseLLM's dynamic time warping on token strings."""
    fallback: Literal["skip", "label"] = "skip"
    """What happens where mode fusellm finds no match: skip leaves the position out of KD, label puts all mass on the label."""
    min_reliability: float = 0.1
    """A position is skipped where less than this share of the source's probability can follow the target's prefix."""
    follow_numbers: bool = False
    """Whether sources are asked how their numbers go on, for a target with tokens of several digits. Otherwise that is estimated."""
    min_ce_unit: Literal["token", "byte"] = "byte"
    """Whether Min-CE compares the sources in nats per byte of the response, or in nats per own token as the paper does."""
    keep: Literal["winner", "all"] = "winner"
    """Whose distributions the targets hold of a sequence: those of the source that won it, or those of all sources. Where
    optim.combine or capture.choice mixes the sources, those of all are kept whatever stands here. A store that has all of them stays as
    it is."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_reliability <= 1:
            raise ConfigError(f"align.min_reliability must be in [0, 1], got {self.min_reliability}; default 0.1")
        if self.follow_numbers and self.mode != "bytes":
            raise ConfigError(
                f"align.follow_numbers must go with align.mode bytes, got mode {self.mode}; leave it out, as fusellm does not use it"
            )


@dataclass(kw_only=True)
class StageConfig:
    """One stage of a schedule. Its loss is inference_weight * L_inference + training_weight * L_training."""

    inference_weight: float = 0.0
    """The weight of the inference mode, where the target learns the response that won the vote and its source's distributions."""
    training_weight: float = 0.0
    """The weight of the training mode, where it learns the ground truth and the distributions of the source that Min-CE chose."""
    beta: float | None = None
    """The weight of KD in this stage; null takes optim.beta."""
    share: float = 1.0
    """The stage's share of optim's steps or epochs, relative to the shares of the other stages."""

    def check(self, name: str) -> None:
        """Raises ConfigError for a stage in which no mode counts, or with an invalid share or beta.

        `name` is the stage's place in the recipe.
        """
        infer, train = self.inference_weight, self.training_weight
        check_not_negative(name, self, "inference_weight", "training_weight")
        if infer + train == 0:
            raise ConfigError(
                f"{name} must have a positive inference_weight or training_weight, got {infer:g} and {train:g}; set one"
            )
        if not (self.share > 0 and math.isfinite(self.share)):
            raise ConfigError(f"{name}.share must be > 0 and finite, got {self.share:g}; remove the stage instead")
        if self.beta is not None and not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ConfigError(f"{name}.beta must be >= 0 and finite, got {self.beta:g}; 0 turns KD off")


@dataclass(kw_only=True)
class DecodeConfig:
    """How `profuser.generate` lets the sources answer together, without training."""

    method: Literal["cool", "gated", "eva", "mixture"] = "cool"
    """cool asks all sources for every segment; with gated the first source writes, and the others are asked where it is not sure;
    eva averages the distributions token by token in the vocabulary of the first source; mixture samples every token from one source,
    which is the exact mixture of sources that share a vocabulary."""
    segment: Literal["shortest", "aligned"] = "shortest"
    """The segments of Cool-Fusion: shortest ends with a word; aligned ends where the tokens of all sources can end as well."""
    criterion: Literal["mean_ppl", "mean_nll"] = "mean_ppl"
    """What is lowest for the segment that wins: the mean of the sources' perplexities (as in the paper), or of their NLLs."""
    weights: list[float] | None = None
    """How much each source's judgement counts, in the order of the sources; null means all alike."""
    max_segment_tokens: int = 16
    """The most tokens that a source writes for a segment in which no word ends."""
    gate: float = 1.0
    """With gated, by how many standard deviations the entropy must be above its running mean for the others to be asked."""
    top_n: int = 3
    """With eva, a source counts where its best token is among this many best tokens of another source."""
    temperature: float = 1.0
    """With mixture, the temperature of the sources' distributions."""
    seed: int = 0
    """With mixture, the seed of the sampling."""
    rerank: bool = False
    """Whether the joint answer is compared with each source's own, and the best of all is taken."""
    batch_size: int = 1
    """How many prompts are answered at a time, each of which keeps a cache in every source. It decides the time, not the answers."""

    def __post_init__(self) -> None:
        check_positive("decode", self, "max_segment_tokens", "top_n", "temperature", "batch_size")
        check_not_negative("decode", self, "seed")
        if self.weights is not None and not (all(0 <= w < LARGEST for w in self.weights) and any(self.weights)):
            raise ConfigError(
                f"decode.weights must be >= 0 and not all 0, and below 2**63, got {self.weights}; leave them out to let all count alike"
            )
        if not abs(self.gate) < LARGEST:
            raise ConfigError(
                f"decode.gate must be a number and its size below 2**63, got {self.gate}; set a large one to ask nobody"
            )


@dataclass(kw_only=True)
class EvaluationConfig:
    """How the held-out answers are scored."""

    match: str | None = None
    """`module:function`; `function(example, response)` says whether an answer is right. null looks for the ground truth in it."""
    examples: int = 6
    """How many held-out prompts the report shows with the answers of all models."""

    def __post_init__(self) -> None:
        check_not_negative("evaluation", self, "examples")


@dataclass(kw_only=True)
class HubConfig:
    """Where the fused model is uploaded to when the run is complete. Only the model's files and its card are."""

    repository: str
    """The repository on the Hugging Face Hub, as org/model. It is created if there is none."""
    private: bool = True
    """Whether the repository must be private. With true, nothing is uploaded to a public one."""


@dataclass(kw_only=True)
class Recipe:
    """A recipe holds everything that decides the outcome of a run."""

    sources: list[SourceConfig]
    """The models that are fused."""
    target: str
    """The model that they are fused into: the name of a source, or the directory or Hub id of another model."""
    data: DataConfig
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    judges: list[JudgeConfig] = field(default_factory=list)
    """The judges that vote in the inference mode. Without any, the schedule must not use that mode."""
    judging: JudgingConfig = field(default_factory=JudgingConfig)
    capture: CaptureConfig = field(default_factory=CaptureConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    schedule: ScheduleName | list[StageConfig] = "progressive"
    """The name of a schedule, or a list of its stages."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    adapter: AdapterConfig | None = None
    """An adapter that is trained in place of the target's weights; null trains all of them."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    hub: HubConfig | None = None
    """Where the fused model is uploaded to; null keeps it here."""
    store: str | None = None
    """The directory of the store, which holds the prepared targets; null means runs/NAME-store with the recipe's name."""
    output: str | None = None
    """The run directory; null means runs/NAME with the recipe's name."""
    seed: int = 0
    """The seed of everything random: the order of the data, and the responses that are sampled."""
    date: str | None = None
    """The date, as 2026-07-31, that chat templates get which write one; null means the day on which the store is begun."""

    def __post_init__(self) -> None:
        names = [source.name for source in self.sources]
        if not names:
            raise ConfigError(
                "sources must name at least one model, got an empty list; add `- {name: ..., model: ...}`"
            )
        if len(names) > MOST_SOURCES:
            raise ConfigError(f"sources must name at most {MOST_SOURCES} models, got {len(names)}; take the others out")
        check_names("sources", names)
        check_names("judges", [judge.name for judge in self.judges])
        columns = [f"{judge.name}_{name}" for judge in self.judges for name in names]
        if twice := next((column for column in columns if columns.count(column) > 1), None):
            raise ConfigError(
                f"judges: a judge's and a source's name must not make the same column for two pairs of them, got score_{twice} twice; "
                "rename one"
            )
        if taken := sorted(set(names) & RESERVED_NAMES):
            raise ConfigError(
                f"sources: a name must not be one of {', '.join(sorted(RESERVED_NAMES))}, got {taken[0]!r}; rename it"
            )
        if self.target not in names and not is_path(self.target) and "/" not in self.target:
            raise ConfigError(
                f"target must be a source's name or a model, got {self.target!r} (sources: {', '.join(names)}); fix target"
            )
        self._check_generation()
        for judge in self.judges:
            if sum(getattr(judge, kind) is not None for kind in JUDGES) != 1:
                raise ConfigError(
                    f"judges: {judge.name} must have one of {', '.join(JUDGES[:-1])} and {JUDGES[-1]}; set exactly one"
                )
        check_not_negative("", self, "seed")
        if self.adapter is not None and self.adapter.quantize is not None and self.optim.shard:
            raise ConfigError(
                "optim.shard must be false with adapter.quantize, whose packed weights are not divided, got true; take one of them out"
            )
        if self.optim.eval_rewards:
            if self.data.location("validation") is None:
                raise ConfigError(
                    f"optim.eval_rewards must go with data.validation, got {self.optim.eval_rewards} and none; name a file with validation "
                    "prompts, set data.validation_share, or leave it out"
                )
            if not self.scoring_judges:
                raise ConfigError(
                    f"optim.eval_rewards needs a judge that is a model or a function, got {self.optim.eval_rewards} and none; add one to "
                    "judges, or leave it out"
                )
        if self.optim.export == "best" and self.data.location("validation") is None:
            raise ConfigError(
                "optim.export: best needs data.validation, got none; name a file with validation prompts, set data.validation_share, or "
                "export the last weights"
            )
        if self.optim.compile and self.optim.shard:
            raise ConfigError(
                "optim.compile must be false with optim.shard, whose blocks are gathered outside of any graph, got true; take one of "
                "them out"
            )
        budget, longest = self.optim.tokens_per_micro_batch, self.data.max_length
        if budget is not None and budget < longest:
            raise ConfigError(
                f"optim.tokens_per_micro_batch must hold a sequence of data.max_length tokens, {longest}, got {budget}; raise it, or "
                "lower data.max_length"
            )
        if self.optim.combine == "route" and self.capture.choice != "weights":
            # Two ways to say the same: where a store or a run remembers its recipe, both are this one.
            self.capture, self.optim = replace(self.capture, choice="route"), replace(self.optim, combine="min_ce")
        if (choice := self.capture.choice) != "min_ce" and self.optim.combine != "min_ce":
            does = "mixes the sources itself" if choice == "weights" else "leaves one source to learn from"
            raise ConfigError(
                f"optim.combine must be left out with capture.choice: {choice}, which {does}, got {self.optim.combine}; take one "
                "of them out"
            )
        if self.align.follow_numbers and (given := next((s for s in self.sources if s.logprobs is not None), None)):
            raise ConfigError(
                f"align.follow_numbers must be false where a source's log-probabilities are given, they are for {given.name}: only its "
                "model can be asked; take one of them out"
            )
        if self.date is not None:
            check_date("date", self.date)
        if isinstance(self.schedule, list):
            if not self.schedule:
                raise ConfigError(f"schedule must have at least one stage, got []; name one of {', '.join(SCHEDULES)}")
            for i, stage in enumerate(self.schedule):
                stage.check(f"schedule[{i}]")

    def _check_generation(self) -> None:
        """Raises ConfigError for a source that cannot answer as it is told to."""
        several = self.generation.responses_per_source
        for source in self.sources:
            generation = self.generation_of(source)
            if several > 1 and generation.temperature == 0 and source.responses is None:
                of = f"of source {source.name} " if "temperature" in source.generation_changes else ""
                raise ConfigError(
                    f"generation.responses_per_source > 1 needs a temperature > 0 (greedy responses are equal), got {several} at 0 "
                    f"{of}".rstrip()
                    + "; set generation.temperature"
                )
            if generation.engine == "server" and source.server is None:
                raise ConfigError(
                    f"sources: {source.name} must have a server with generation.engine server, it has none; add its URL as `server`"
                )

    @property
    def target_config(self) -> SourceConfig:
        """The target's model: the source of that name or, where there is none, the model that `target` itself is."""
        by_name = {source.name: source for source in self.sources}
        return by_name.get(self.target) or SourceConfig(name="target", model=self.target)

    @property
    def keep(self) -> Literal["winner", "all"]:
        """Whose distributions the targets must hold at least: all sources' where they are mixed."""
        mixed = self.optim.combine != "min_ce" or self.capture.choice == "weights"
        return "all" if mixed else self.align.keep

    @property
    def scoring_judges(self) -> list[JudgeConfig]:
        """The judges that can score new responses: models and functions, and no files of scores."""
        return [judge for judge in self.judges if judge.scores is None]

    def reasoning_of(self, source: SourceConfig) -> Reasoning:
        """What becomes of the reasoning before a model's answers."""
        return source.reasoning or self.generation.reasoning

    def generation_of(self, source: SourceConfig) -> GenerationConfig:
        """How a source answers: the recipe's `generation`, with what the source does otherwise."""
        changes = source.generation_changes | {"reasoning": self.reasoning_of(source)}
        if changes.get("engine", self.generation.engine) not in WITH_PYTHON:
            changes["python"] = None
        return replace(self.generation, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Returns the whole recipe as nested plain values, defaults included."""
        return asdict(self)
