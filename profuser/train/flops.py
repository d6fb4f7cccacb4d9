"""How much of a GPU's peak a training uses: the model FLOP utilisation of PaLM (arXiv 2204.02311, appendix B).

A sequence of t tokens costs 6·N·t + 12·L·H·Q·t² operations, forward and backward: 2 for each weight and token in the forward pass, and 4
in the backward pass, for the gradients of inputs and weights; and in each of L layers two products in attention, of H heads with Q
columns. N are the weights that take part in a product with every token, the head among them: an embedding is only looked up, unless it
is the head as well. A frozen weight, as beside an adapter, has no gradient of its own and costs 4 instead of 6.

What does not count: padding, activations that are computed again, the loss beyond the head, AdamW's update. Attention counts in full
although it is causal, and the head at every token although the loss computes it at the labels alone, as others count, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from profuser.models.head import head_layer
from profuser.models.layers import configs_of_layers
from profuser.train.zero import shape_of

# Dense bf16 products with fp32 sums, in 10^12 operations per second, from NVIDIA's data sheets of A100 (June 2021), H100 (SXM, PCIe and
# NVL), H200, HGX B200 and L40S, where those from the H100 on print twice as much, with sparsity; and from the white paper on the Ada
# architecture, appendix A, for the RTX 4090. A name stands for the whole GPU: a slice of it (MIG) has another one.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA B200": 2250.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA GeForce RTX 4090": 165.2,
}
"""The peaks of GPUs by the names that CUDA gives them."""

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What configurations call the number of experts, of which a token meets a few only."""
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
"""The types of layers that have attention, where a configuration names the type of every layer."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What training a model costs: operations per token, and in attention per token and token of the same sequence."""

    per_token: int
    per_square: int

    def flops(self, tokens: int, squares: int) -> int:
        """The operations for sequences with so many tokens and so large a sum of their squared lengths."""
        return self.per_token * tokens + self.per_square * squares


def cost_of(model: PreTrainedModel) -> Cost | None:
    """Counts a target's weights as they are trained; None for a mixture of experts, through which a token takes its own way."""
    config = model.config.get_text_config()
    if any((getattr(config, name, None) or 1) > 1 for name in EXPERTS):
        return None
    head = head_layer(model).weight
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} - {id(head)}
    per_token = sum(
        (6 if parameter.requires_grad else 4) * math.prod(_shape_of(parameter))
        for parameter in model.parameters()  # a tied one comes once
        if id(parameter) not in looked_up
    )
    layers = configs_of_layers(config)
    types = getattr(config, "layer_types", None) or ATTENTION[:1] * len(layers)
    columns = 0  # of all heads of all layers with attention
    for kind, layer in zip(types, layers, strict=False):
        heads = getattr(layer, "num_attention_heads", None)
        if heads and kind in ATTENTION:
            columns += heads * (getattr(layer, "head_dim", None) or layer.hidden_size // heads)
    return Cost(per_token, 12 * columns)


def _shape_of(parameter: nn.Parameter) -> Sequence[int]:
    """The shape of a weight as it is computed with, which bitsandbytes packs into fewer bytes in 4 bits, and DeepSpeed divides."""
    quantized = getattr(parameter, "quant_state", None)
    return shape_of(parameter) if quantized is None else quantized.shape


def peak_flops(device: torch.device, *, bf16: bool) -> float | None:
    """Returns the operations per second that a device can do at most; None where that is not known, or not for its arithmetic."""
    if device.type != "cuda" or not bf16:
        return None
    tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name(device))
    return None if tflops is None else tflops * 1e12


def utilisation(flops: float, seconds: float, processes: int, peak: float) -> float:
    """Returns the share of the peak of all processes' devices that so many operations in so much time are."""
    return flops / (seconds * processes * peak)
