"""The recipe's group `optim`: how the target is trained, and with which loss. schema.py says what the texts under the fields are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from profuser.errors import ConfigError
from profuser.kernels.divergences import FORWARD_KL, WITH_BETA, Divergence, check_divergence
from profuser.kernels.tails import BUCKET, RENORMALIZE, Tail
from profuser.recipe.checks import check_names, check_not_negative, check_positive

EIGHT_BIT = "adamw_8bit"
Combine = Literal["min_ce", "avg_ce", "softmax", "route"]


@dataclass(kw_only=True)
class OptimConfig:
    """How the target is trained: with AdamW, and with a warm-up and a cosine learning rate that start anew in every stage."""

    lr: float = 1e-5
    """The peak learning rate (FuseLLM's value)."""
    min_lr_ratio: float = 0.0
    """The cosine ends at this share of lr."""
    warmup_ratio: float = 0.008
    """The share of a stage's steps in which the learning rate rises (FuseLLM's value)."""
    weight_decay: float = 0.1
    """AdamW's weight decay, which applies to matrices only (FuseLLM's value)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's betas (FuseLLM's values)."""
    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """The optimizer: AdamW with its moments in fp32, or in 8 bits (needs the package bitsandbytes), which saves 6 of 16 bytes per
    parameter; small tensors and embeddings keep theirs in fp32."""
    grad_clip: float = 1.0
    """A gradient with a larger norm is scaled down to this norm (FuseLLM's value)."""
    batch_size: int = 128
    """How many instructions an optimizer step takes, over all processes (FuseLLM's value)."""
    micro_batch_size: int = 8
    """How many instructions one process takes into a forward pass."""
    tokens_per_micro_batch: int | None = None
    """The most tokens that one process takes into a forward pass, in which sequences are then packed, several to a row; at least
    data.max_length. null counts instructions by micro_batch_size, and pads."""
    epochs: float = 3.0
    """How often the training instructions are passed over, all stages together (three in the paper)."""
    steps: int | None = None
    """The number of optimizer steps, all stages together. If it is set, epochs is ignored."""
    beta: float = 0.1 / 0.9
    """The weight of KD beside cross-entropy (it follows from FuseLLM's weights, 0.9 for CE and 0.1 for KD)."""
    temperature: float = 1.0
    """The temperature of the divergence. Any other than 1 needs tail: renormalize or conditional."""
    tail: Tail = BUCKET
    """What becomes of the mass outside the kept entries: bucket matches it as one entry, renormalize divides it out, conditional divides
    it out of source and target."""
    divergence: Divergence = FORWARD_KL
    """What compares the target with a source: forward_kl (the paper's), reverse_kl, jsd (GKD's), skew_kl and skew_reverse_kl
    (DistiLLM's), or tvd, the total variation distance."""
    divergence_beta: float = 0.5
    """The beta of jsd (0 is forward_kl, 1 is reverse_kl), or the alpha of skew_kl and skew_reverse_kl (0.1 in DistiLLM)."""
    combine: Combine = "min_ce"
    """How a sequence's sources come together in the training mode: min_ce takes the one with the lowest cross-entropy, softmax mixes all
    with the weights softmax(-CE / combine_temperature), and avg_ce is softmax at 1 (FuseLLM's AvgCE). In the inference mode the winner
    of the vote is alone. route is a short way to say capture.choice: route, which concerns both modes."""
    combine_temperature: float = 1.0
    """The temperature of combine: softmax, in the units of the cross-entropy."""
    z_loss: float = 0.0
    """The weight of the squared log-sum-exp of the logits beside cross-entropy, which keeps logits small; 0.0001 is usual."""
    label_smoothing: float = 0.0
    """The share of cross-entropy that is spread evenly over the vocabulary."""
    left_out: float = 0.0
    """The share of the loss's gradient in the logits that need not be exact, for a faster step; 0 is exact, and 0.003 costs about as much
    exactness as bf16 does. On a GPU, where it has not been tried, the steps before decide how many columns are kept, so that the share
    may be larger at times; metrics.jsonl says it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """The arithmetic of the target. auto means bf16 on CUDA and fp32 on the CPU; it is settled when a run is begun."""
    deterministic: bool = False
    """Whether only deterministic algorithms are used in training, so that a GPU gives the same bits each time. Some are slower."""
    shard: bool = False
    """Whether the processes share the target's weights, gradients and moments (FSDP2) instead of each holding all of them."""
    compile: bool = False
    """Whether torch.compile makes one graph of the target without its head. It takes a minute or so at the start and needs a C++ compiler
    (with a GPU: Triton); the loss is not compiled, which has kernels of its own."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass, which saves memory and costs another forward pass. On a CPU freed memory
    is then returned to the system at once, which costs about a tenth more."""
    eval_every: int = 100
    """CE and KD on data.validation are measured every so many steps; 0 leaves only the start and the ends of the stages."""
    eval_rewards: int = 0
    """How many prompts of data.validation the target answers at each of these times, greedily, so that the judges score its answers; 0
    means none. The judges that are models are loaded for it each time."""
    checkpoint_every: int = 500
    """A checkpoint is saved every so many steps; 0 saves one only at the end and on interruption."""
    async_checkpoints: bool = False
    """Whether a checkpoint is written while training goes on, from a copy of the state in the machine's memory."""
    keep_checkpoints: int = 2
    """How many checkpoints are kept; older ones are deleted, apart from the best."""
    keep_best: bool = True
    """Whether the checkpoint with the lowest CE on data.validation is kept, too. It is saved as soon as that CE is measured."""
    export: Literal["last", "best"] = "last"
    """Which weights the run writes at its end: the last ones, or those with the lowest CE on data.validation."""
    log_every: int = 10
    """A line is added to metrics.jsonl every so many steps; in a short stage more often, so that it has ten lines, or one for every step
    if it has fewer than ten."""
    trackers: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    """Where the lines of metrics.jsonl are shown as well; each needs its package, as in `pip install 'profuser[tensorboard]'`."""
    data_workers: int = 1
    """How many processes prepare the next batches during a step; with 0 the trainer prepares each batch between two steps."""

    def __post_init__(self) -> None:
        check_positive(
            "optim", self, "batch_size", "micro_batch_size", "lr", "epochs", "grad_clip", "temperature", "log_every",
            "keep_checkpoints", "tokens_per_micro_batch", "combine_temperature",
        )  # fmt: skip
        check_not_negative(
            "optim", self, "beta", "z_loss", "label_smoothing", "left_out", "weight_decay", "warmup_ratio", "min_lr_ratio",
            "eval_every", "eval_rewards", "checkpoint_every", "data_workers",
        )  # fmt: skip
        check_names("optim.trackers", self.trackers)
        if self.name == EIGHT_BIT and self.shard:
            raise ConfigError(
                f"optim.shard must be false with optim.name: {EIGHT_BIT}, whose blocks of moments are not divided, got true; take one of "
                "them out"
            )
        if self.export == "best" and not self.keep_best:
            raise ConfigError("optim.export: best needs optim.keep_best: true, got false; take one of them out")
        for name in ("warmup_ratio", "min_lr_ratio"):
            if (share := getattr(self, name)) > 1:
                raise ConfigError(f"optim.{name} is a share and must be <= 1, got {share}; give a share")
        if not all(0 <= b < 1 for b in self.betas):
            raise ConfigError(f"optim.betas must be in [0, 1), got {list(self.betas)}; default [0.9, 0.95]")
        if self.steps is not None and not 1 <= self.steps < 2**53:
            raise ConfigError(
                f"optim.steps must be >= 1 and below 2**53, or null, got {self.steps}; remove it to train by epochs"
            )
        if self.temperature != 1 and self.tail == BUCKET:
            raise ConfigError(
                f"optim.temperature must be 1 with tail: {BUCKET} (a tail of many tokens has no temperature), got "
                f"{self.temperature:g}; set optim.tail: {RENORMALIZE}"
            )
        if self.combine != "softmax" and self.combine_temperature != 1:
            raise ConfigError(
                f"optim.combine_temperature is for combine: softmax, got {self.combine_temperature:g} with {self.combine}; take it out"
            )
        if self.divergence_beta != 0.5 and self.divergence not in WITH_BETA:
            raise ConfigError(
                f"optim.divergence_beta is for divergence: {', '.join(WITH_BETA)}, got {self.divergence_beta:g} with "
                f"{self.divergence}; take it out, or set optim.divergence"
            )
        if self.label_smoothing >= 1:
            raise ConfigError(f"optim.label_smoothing must be < 1, got {self.label_smoothing:g}; 0.1 is usual")
        if self.left_out >= 1:
            raise ConfigError(f"optim.left_out must be < 1, got {self.left_out:g}; 0.003 is about as exact as bf16")
        try:
            check_divergence(self.divergence, self.divergence_beta, self.tail)
        except ValueError as error:
            raise ConfigError(f"optim.{error}") from None

    @property
    def loss_options(self) -> dict[str, Any]:
        """What FusionModel is told. A store's distributions are at temperature 1, and are combined when a batch is made."""
        names = ("temperature", "tail", "divergence", "divergence_beta", "z_loss", "label_smoothing", "left_out")
        return {name: getattr(self, name) for name in names} | {"source_temperature": 1.0}

    @property
    def mixing(self) -> float | None:
        """The temperature of the softmax over -CE that weighs a sequence's sources; None where the one of lowest CE is chosen."""
        return None if self.combine == "min_ce" else self.combine_temperature
