"""How much memory training takes in each process, part by part, in bytes.

A process holds the weights and, while it learns, AdamW's two moments and the gradients, all in fp32. What a forward pass keeps for
its backward pass comes on top, and so does the loss, of which no part is as large as [tokens, vocabulary]. There are three
moments at which a step may need the most memory: when the backward pass begins, when it ends, and when AdamW changes the weights.

Under DDP a process holds all of that for the whole model; its gradients lie in the buffers that the processes exchange. Sharded
(FSDP2), it holds its share of weights, gradients and moments, and gathers what it computes with: a decoder block, the next one,
and all that is outside of the blocks. Weights that an adapter freezes have neither gradients nor moments, and are shared as well.
"""

from __future__ import annotations

from dataclasses import dataclass

from profuser.kernels.common import chunk_rows, chunk_rows_gpu
from profuser.kernels.rows import is_built
from profuser.plan.architecture import Architecture
from profuser.recipe.optim import EIGHT_BIT, OptimConfig

FP32, BF16 = 4, 2

NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
"""The bytes of a weight in NF4: 4 bits, one of 8 bits for each block of 64, and one of 32 for each 256 of those."""

PROCESS = 400 << 20
"""What a process takes beside what is counted here.

Python, torch, transformers and a recipe's opened inputs took 350 to 377 MiB before any model was loaded. The rest is what the C library
keeps between tensors; whole runs of the demo needed 0 to 50 MiB for it (docs/plan.md).
"""

ADAPTER = 55 << 20
"""What peft and bitsandbytes, which it loads where it is installed, add to PROCESS."""

PIECES = 0.75
"""The share of its activations that a CPU's process keeps beside them in pieces, where it trains an adapter on padded passes that keep
their activations.

In each layer an adapter frees tensors between others that stay. Where the next pass has another length, the C library seldom finds use
for the gaps; packed passes have about one length, and where all weights are trained, their gradients fill the gaps. It was measured with
SmolLM2-135M and with the demo's target (docs/plan.md).
"""

EIGHT_BITS = 1 + 4 / 256
"""The bytes of a moment in 8 bits: its own, and four for each block of 256."""

RETURNED = 32 << 20
"""Blocks of at least this size the C library returns to the system as soon as they are freed. Smaller ones may stay."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The largest forward pass of a process: its shape, what it keeps, and how many there are in a step."""

    rows: int
    length: int
    activations: int
    copies: int
    in_step: int

    @property
    def tokens(self) -> int:
        """The number of tokens, padding included."""
        return self.rows * self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingMemory:
    """The memory of one process at training, in bytes.

    processes: how many there are. sharded: whether they share weights, gradients and moments.
    exchange: what FSDP2 gathers. activations: what a pass keeps. copies: the weights in 16 bits.
    loss, ending, update: what is added by the loss, the end of the backward pass, and AdamW's step.
    single: whether a step has one forward pass, which begins without gradients.
    """

    processes: int
    sharded: bool
    weights: int
    gradients: int
    moments: int
    exchange: int
    activations: int
    copies: int
    loss: int
    ending: int
    update: int
    single: bool

    @property
    def lasting(self) -> int:
        """What is held all the time."""
        return self.weights + self.moments + self.exchange

    @property
    def peak(self) -> int:
        """The most that is held at any time."""
        before = 0 if self.single else self.gradients
        beginning = before + self.activations + self.copies + self.loss
        return self.lasting + max(beginning, self.gradients + self.ending, self.gradients + self.update)


def training_memory(
    target: Architecture, optim: OptimConfig, one: Pass, *, processes: int, sharded: bool, cuda: bool, top_k: int
) -> TrainingMemory:
    """Returns what one of the processes needs.

    Args:
        one: the largest forward pass. top_k: how many entries a source's distribution has.
    """
    # Weights that an adapter freezes have neither gradients nor moments, and are in 16 bits where the passes are.
    frozen = (target.parameters - target.trained - target.quantized) * (BF16 if one.copies else FP32)
    frozen += round(NF4 * target.quantized)
    whole = FP32 * target.trained
    share = -(-whole // processes) if sharded else whole
    kept = -(-frozen // processes) if sharded else frozen
    head = FP32 * target.vocabulary * target.width
    exchange = copies = 0
    if sharded:
        # A block is computed while the next one is gathered. Their gradients are full until they are divided among the processes.
        gathered = 2 * target.block + target.root
        exchange = (BF16 if one.copies else FP32) * gathered + FP32 * target.trained_block
    else:
        copies = 0 if frozen else one.copies
    return TrainingMemory(
        processes=processes,
        sharded=sharded,
        weights=share + kept,
        gradients=share,
        moments=-(-moment_bytes(target, optim) // (processes if sharded else 1)),
        exchange=exchange,
        activations=one.activations,
        copies=copies,
        loss=loss_bytes(target, optim, one.tokens, top_k=top_k, cuda=cuda, bf16=one.copies > 0),
        # The embeddings' gradient is dense, and is added to that of the tied head or of the pass before.
        ending=head if not frozen and (target.config.get_text_config().tie_word_embeddings or one.in_step > 1) else 0,
        update=update_bytes(target, optim, share, cuda=cuda),
        single=one.in_step == 1 and (sharded or processes == 1),  # DDP's buffers are always there
    )


def moment_bytes(target: Architecture, optim: OptimConfig) -> int:
    """Returns what AdamW's two moments take of a process that holds all of them."""
    small = target.eight_bit if optim.name == EIGHT_BIT else 0
    return 2 * (round(EIGHT_BITS * small) + FP32 * (target.trained - small))


def update_bytes(target: Architecture, optim: OptimConfig, share: int, *, cuda: bool) -> int:
    """Returns what AdamW computes with. `share` is the size of the weights that a process changes.

    On a GPU torch's takes all parameters at a time, on a CPU one after the other. That of bitsandbytes needs nothing on a GPU; on a CPU
    it makes the moments of a parameter whole, and computes with two more tensors of that size.
    """
    if optim.name == EIGHT_BIT:
        return 0 if cuda else FP32 * max(4 * target.largest_eight_bit, 2 * target.largest)
    return share if cuda else 2 * FP32 * target.largest


def loss_bytes(target: Architecture, optim: OptimConfig, tokens: int, *, top_k: int, cuda: bool, bf16: bool) -> int:
    """Returns the memory that the fused loss takes beyond its inputs (kernels/README.md, "Memory and chunks").

    The gradients of head and hidden states are held in fp32 from the forward to the backward pass, which multiplies them in place, or
    in bf16 into new tensors. The logits of a chunk of tokens exist in the forward pass only.
    """
    vocabulary, width = target.vocabulary, target.width
    learns = target.trained == target.parameters  # else the head is frozen
    gradients = FP32 * (learns * vocabulary * width + tokens * width)
    if cuda:
        rows = chunk_rows_gpu(tokens, vocabulary, width)
        chunk = rows * vocabulary * (FP32 + BF16)  # logits, and their gradient in 16 bits
        operands = BF16 * (vocabulary * width + tokens * width) if bf16 else 0
        entries = tokens * (top_k + 1) * 2 * FP32
    else:
        text = target.config.get_text_config()
        softcap = any(getattr(text, key, None) for key in ("final_logit_softcapping", "logits_soft_cap"))
        # Rows in C++ need no buffer for their temperature.
        at_T = optim.temperature != 1 and (optim.left_out > 0 or not is_built())
        buffers = 1 + at_T + softcap
        chunk = chunk_rows(tokens, vocabulary, FP32) * vocabulary * FP32 * buffers
        operands = 0
        entries = tokens * top_k * 6 * 8  # the merging of equal ids is done in fp64
    return max(gradients + chunk + operands + entries, 2 * gradients if bf16 else 0)


def checkpoint_bytes(target: Architecture, optim: OptimConfig, *, cuda: bool) -> int:
    """Returns what a checkpoint adds to the memory of the machine's first process, not of its GPU, while it is written.

    These are the bytes of the weights, and twice those of the moments, which safetensors assembles and then returns as a copy
    (profuser/train/checkpoint.py); from a GPU, and where it is written while training goes on, a copy of both as well.
    """
    weights, moments = FP32 * target.trained, moment_bytes(target, optim)
    return weights + 2 * moments + (weights + moments if cuda or optim.async_checkpoints else 0)


@dataclass(frozen=True, slots=True)
class Preparing:
    """The memory that one model needs while the store is made, in bytes: its weights, and what it computes with.

    piece: the size of the tensors that it computes with.
    """

    name: str
    doing: str
    weights: int
    working: int
    piece: int

    @property
    def peak(self) -> int:
        """The sum of both."""
        return self.weights + self.working

    @property
    def kept(self) -> int:
        """What of it stays with a CPU's process when it is done."""
        return self.working if self.piece < RETURNED else 0


def answering(source: Architecture, name: str, itemsize: int, rows: int, length: int) -> Preparing:
    """A source that answers `rows` prompts at a time: the keys and values of all their tokens, and the logits of the next."""
    working = rows * length * source.cache * itemsize + 3 * rows * source.vocabulary * FP32
    piece = rows * length * source.cache * itemsize // (2 * source.layers)  # the keys of a layer
    return Preparing(name, "answers", source.parameters * itemsize, working, piece)


def reading(model: Architecture, name: str, doing: str, itemsize: int, rows: int, length: int) -> Preparing:
    """A source or judge that reads `rows` texts at a time: the widest activations of a layer, and of a source a chunk of logits."""
    working = rows * length * (4 * model.width + 3 * model.inner) * itemsize
    if model.kind == "generates":
        working += 2048 * model.vocabulary * FP32
    return Preparing(name, doing, model.parameters * itemsize, working, rows * length * model.inner * itemsize)
