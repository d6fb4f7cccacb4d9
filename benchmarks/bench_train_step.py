"""A whole training step: the forward pass of a Llama, the loss, the backward pass and AdamW.

    pytest benchmarks/bench_train_step.py --benchmark-only

Model, batch and optimizer are the same with each loss. `no-loss` backpropagates the mean of the last hidden states; it is what
the step costs without head and loss. `times_floor` is the median time divided by that of `no-loss`, which is timed between
the rounds. `peak_mib` does not count parameters, gradients and AdamW's states, which exist before the measured step.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.cases import DEVICE, DTYPE, INTERPRETED, TAIL
from benchmarks.implementations import dense, fusellm
from benchmarks.measure import cuda_peak_mib, process_peaks_mib, timed
from profuser.fusion_model import FusionModel
from profuser.kernels.reference import fusion_loss_reference
from profuser.models.head import hidden_states

S, K = 3, 10
# B sequences of T tokens, for a Llama of about 5M parameters on a CPU and of about 1.2B on CUDA.
PLACE = "interpreted" if INTERPRETED else DEVICE
B, T, ROUNDS = {"cpu": (4, 256, 3), "cuda": (4, 2048, 5), "interpreted": (2, 16, 1)}[PLACE]
CONFIG: dict[str, Any] = {
    "cpu": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    | {"num_key_value_heads": 4, "vocab_size": 32000},
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 128256},
    "interpreted": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "vocab_size": 300},
}[PLACE] | {"max_position_embeddings": T, "tie_word_embeddings": True}
CHECKED_TOKENS = 64
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}[DTYPE]


def make_batch():
    """A batch as FusionModel takes it, in which a token's label and distributions stand at that token."""
    V = CONFIG["vocab_size"]
    g = torch.Generator(DEVICE).manual_seed(0)
    input_ids = torch.randint(V, (B, T), generator=g, device=DEVICE)
    offsets = torch.randint(V // K, (S, B, T, K), generator=g, device=DEVICE)
    offsets += torch.arange(K, device=DEVICE) * (V // K)
    offsets[..., 0] = 0
    entries = torch.randn(S, B, T, K, generator=g, device=DEVICE).mul_(4)
    return {
        "input_ids": input_ids,
        "labels": input_ids,
        "source_ids": ((input_ids[..., None] + offsets) % V).int(),
        "source_logprobs": entries.sort(dim=-1, descending=True).values.log_softmax(-1),
        "source_ce": torch.rand(S, B, generator=g, device=DEVICE),
    }


def rows(hidden, batch) -> dict[str, Any]:
    """The arguments of a loss that takes rows: each hidden state with what belongs to the next token."""
    sequences, tokens, D = hidden.shape
    return {
        "hidden": hidden[:, :-1].reshape(-1, D),
        "labels": batch["labels"][:, 1:].reshape(-1),
        **{name: batch[name][:, :, 1:].reshape(S, -1, K) for name in ("source_ids", "source_logprobs")},
        "source_ce": batch["source_ce"],
        "cu_seqlens": torch.arange(sequences + 1, device=hidden.device) * (tokens - 1),
        "tail": TAIL,
    }


# Each of the next functions takes the model and returns a function of a batch. So work that is done once is not timed.


def fusion_model(model):
    fusion = FusionModel(model, tail=TAIL)
    return lambda batch: fusion(**batch)["loss"]


def on_rows(loss, model):
    return lambda batch: loss(
        weight=model.lm_head.weight, **rows(hidden_states(model, batch["input_ids"], None), batch)
    )


def transformers_loss(model):
    """Cross-entropy alone, as Hugging Face computes it. This is what plain fine-tuning costs."""
    return lambda batch: model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss


def no_loss(model):
    return lambda batch: hidden_states(model, batch["input_ids"], None).float().mean()


IMPLEMENTATIONS = {
    "no-loss": ("nothing", no_loss),
    "profuser": ("fusion", fusion_model),
    "dense-fusellm": ("fusion", functools.partial(on_rows, fusellm)),
    "dense-torch": ("fusion", functools.partial(on_rows, dense)),
    "transformers": ("cross-entropy", transformers_loss),
}


def make_model(**changed: Any) -> LlamaForCausalLM:
    """The Llama of CONFIG, some of whose sizes may be `changed`."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = LlamaForCausalLM(LlamaConfig(**(CONFIG | changed)))
        return model.to(DTYPE)  # pyrefly: ignore[bad-argument-type]  # transformers wraps `to`


def make_step(implementation):
    model, batch = make_model(), make_batch()
    loss = IMPLEMENTATIONS[implementation][1](model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step():
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


@functools.cache
def process_peaks():
    return dict(zip(IMPLEMENTATIONS, process_peaks_mib(make_step, [(name,) for name in IMPLEMENTATIONS])))


def check(implementation):
    """Checks the loss of one short sequence against the dense reference on the model's hidden states."""
    computes, loss_of = IMPLEMENTATIONS[implementation]
    if computes == "nothing":
        return
    model, batch = make_model(), make_batch()
    part = {name: batch[name][:1, :CHECKED_TOKENS] for name in ("input_ids", "labels")}
    part |= {name: batch[name][:, :1, :CHECKED_TOKENS] for name in ("source_ids", "source_logprobs")}
    part["source_ce"] = batch["source_ce"][:, :1]
    with torch.no_grad():
        found = loss_of(model)(part)
        hidden = hidden_states(model, part["input_ids"], None).double()
        inputs = rows(hidden, part) | {"weight": model.lm_head.weight.double()}
        if computes == "cross-entropy":
            inputs = {name: inputs[name] for name in ("hidden", "weight", "labels")}
        with torch.device(DEVICE):
            true = fusion_loss_reference(**inputs)
    torch.testing.assert_close(found.double(), true, rtol=TOLERANCE, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_train_step(benchmark, implementation):
    sizes = f"{B} x {T} tokens, D={CONFIG['hidden_size']}, V={CONFIG['vocab_size']}"
    benchmark.group = f"training step: {CONFIG['num_hidden_layers']} layers, {sizes}, S={S}, K={K} (floor: no loss)"
    try:
        check(implementation)
        step = make_step(implementation)
        info = {"implementation": implementation, "computes": IMPLEMENTATIONS[implementation][0], "dtype": str(DTYPE)}
        timed(benchmark, step, make_step("no-loss"), ROUNDS, **info)
        benchmark.extra_info["tokens_per_s"] = round(B * T / benchmark.extra_info["median_ms"] * 1e3)
        if not INTERPRETED:
            peak = cuda_peak_mib(step) if DEVICE == "cuda" else process_peaks()[implementation]
            benchmark.extra_info["peak_mib"] = peak
    except torch.OutOfMemoryError as error:
        pytest.skip(f"{implementation} does not fit: {error}"[:200])
