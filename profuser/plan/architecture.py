"""What the models of a recipe are made of: how many parameters they have, and what a pass through one keeps in memory.

A model is built on no device: its tensors have shapes and no content. So no weights are read and nothing is computed, and every
architecture that transformers knows is counted as it is, tied embeddings included. The configurations of the paper's models are
bundled, so that its recipe can be planned without a network.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from huggingface_hub import try_to_load_from_cache
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import Node, saved_tensors_hooks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import moe

from profuser.errors import ConfigError, DataError, first_line
from profuser.models.head import head_layer, hidden_states
from profuser.models.layers import configs_of_layers
from profuser.models.load import read_config, weights_of
from profuser.recipe.adapter import AdapterConfig
from profuser.recipe.schema import SourceConfig
from profuser.train.adapter import with_adapter
from profuser.train.optimizer import in_eight_bits
from profuser.typed import read_json

CONFIGS = Path(__file__).parent / "configs"
"""Configurations of models on the Hub, with the sizes alone, as OWNER--NAME.json."""

CLASSES: dict[str, Any] = {"generates": AutoModelForCausalLM, "scores": AutoModelForSequenceClassification}
COPIES = {"TBackward0", "ToCopyBackward0"}
"""What autograd calls the two steps by which a weight becomes the 16-bit operand of a linear layer."""


@dataclass(frozen=True)
class Architecture:
    """A model without its weights.

    name: the model's name in the recipe. here: whether its files are on this machine.
    bundled: whether the configuration is the one that comes with profuser.
    adapter: the LoRA adapter that is trained in place of the weights, if the model is a target that has one.
    """

    name: str
    config: PreTrainedConfig
    kind: Literal["generates", "scores"]
    here: bool
    bundled: bool
    trust_remote_code: bool = False
    adapter: AdapterConfig | None = None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model on torch's meta device.

        Raises:
            DataError: transformers cannot build it. ConfigError: the adapter does not fit it.
        """
        try:
            with torch.device("meta"):
                return self._build() if self.adapter is None else with_adapter(self._build(), self.adapter)
        except ConfigError:  # ours, about the adapter
            raise
        except Exception as error:  # the configuration may ask for anything, and the model's own code raise anything
            raise DataError(
                f"{self.name}: the plan needs a model that transformers can build, {self.config.model_type!r} failed "
                f"({first_line(error)}); check its config.json"
            ) from error

    def _build(self) -> PreTrainedModel:
        return CLASSES[self.kind].from_config(
            self.config, dtype=torch.float32, trust_remote_code=self.trust_remote_code
        )

    @cached_property
    def parameters(self) -> int:
        """The number of parameters. Tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @cached_property
    def trained(self) -> int:
        """The number of parameters that are trained: all, or those of the adapter."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @cached_property
    def quantized(self) -> int:
        """The number of parameters that an adapter freezes in 4 bits: those of all linear layers but the head."""
        if self.adapter is None or self.adapter.quantize is None:
            return 0
        head = head_layer(self.model)
        linear = [m for m in self.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        return sum(m.weight.numel() for m in linear if not m.weight.requires_grad)

    @cached_property
    def eight_bit(self) -> int:
        """The number of parameters whose moments `adamw_8bit` holds in 8 bits."""
        return sum(parameter.numel() for parameter in in_eight_bits(self.model))

    @cached_property
    def largest_eight_bit(self) -> int:
        """The number of parameters of the largest tensor of these."""
        return max((parameter.numel() for parameter in in_eight_bits(self.model)), default=0)

    @cached_property
    def largest(self) -> int:
        """The number of parameters of the largest tensor that is trained, as a rule the embeddings or the head."""
        return max(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    @property
    def block(self) -> int:
        """The number of parameters of a decoder block, the largest of them if they differ."""
        return max((sum(p.numel() for p in parameters) for parameters in self._blocks), default=0)

    @property
    def trained_block(self) -> int:
        """The number of those that are trained in a decoder block, the largest if they differ."""
        trained = ([p.numel() for p in parameters if p.requires_grad] for parameters in self._blocks)
        return max(map(sum, trained), default=0)

    @cached_property
    def _blocks(self) -> list[list[torch.nn.Parameter]]:
        """The parameters of each decoder block."""
        lists = [m for m in self.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == self.layers]
        return [list(block.parameters()) for blocks in lists for block in blocks]

    @property
    def root(self) -> int:
        """The number of parameters outside of the decoder blocks: embeddings, head and the last norm."""
        inside = {parameter for block in self._blocks for parameter in block}
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter not in inside)

    @property
    def layers(self) -> int:
        """The number of decoder blocks."""
        return self.config.get_text_config().num_hidden_layers

    @property
    def vocabulary(self) -> int:
        """The number of rows of the head."""
        return self.config.get_text_config().vocab_size

    @property
    def width(self) -> int:
        """The number of columns of the head."""
        return self.config.get_text_config().hidden_size

    @property
    def inner(self) -> int:
        """The width of the largest activation, that inside of an MLP."""
        sizes = [
            getattr(layer, "intermediate_size", None) or 4 * self.width for layer in configs_of_layers(self.config)
        ]
        return max(max(size) if isinstance(size, list | tuple) else size for size in sizes)

    @property
    def cache(self) -> int:
        """How many numbers generation keeps for a token: the keys and values of all layers."""
        numbers = 0
        for layer in configs_of_layers(self.config):
            if heads := getattr(layer, "num_attention_heads", None):  # a Mamba has none, and a state that does not grow
                size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
                numbers += 2 * (getattr(layer, "num_key_value_heads", None) or heads) * size
        return numbers

    def saved(self, rows: int, length: int, *, bf16: bool, checkpointing: bool) -> tuple[int, int]:
        """What a forward pass keeps for its backward pass, in bytes. An adapter keeps the same inputs, and little beside them.

        Args:
            rows, length: the shape of the batch, in sequences and in tokens.
            bf16: whether it runs under autocast.
        Returns:
            The bytes of activations, and those of the weights' 16-bit copies.
        Raises:
            DataError: the model cannot be traced without values.
        """
        try:
            # transformers multiplies the experts of a mixture by an operation that has no shape without values, or by one that has.
            with FakeTensorMode(), patch.object(moe, "_can_use_grouped_mm", lambda *_: False, create=True):
                return saved_bytes(self._build(), rows, length, bf16, checkpointing)
        except Exception as error:  # a model that looks at its activations' values, in whatever way
            raise DataError(
                f"{self.name}: the plan needs a model whose shapes follow from its configuration, {self.config.model_type!r} "
                f"failed ({first_line(error)}); plan with another target"
            ) from error


def saved_bytes(model: PreTrainedModel, rows: int, length: int, bf16: bool, checkpointing: bool) -> tuple[int, int]:
    """Does what `Architecture.saved` does, with a model of fake tensors."""
    model.train()
    if checkpointing:
        with warnings.catch_warnings():  # some versions of transformers have a new name for it
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()
    # A storage counts once, however many tensors look at it, and the model's own count elsewhere.
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            (copies if is_copy_of_weight(tensor) else kept)[storage._cdata] = storage
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    with saved_tensors_hooks(keep, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden_states(model, ids, None)
    return sum(s.nbytes() for s in kept.values()), sum(s.nbytes() for s in copies.values())


def is_copy_of_weight(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a parameter in another dtype, transposed or not."""
    node: Node | None = tensor.grad_fn
    while node is not None and node.name() in COPIES:
        node = node.next_functions[0][0]
    return node is not None and node is not tensor.grad_fn and type(node).__name__ == "AccumulateGrad"


def open_architecture(model: SourceConfig, kind: Literal["generates", "scores"] = "generates") -> Architecture:
    """Opens the configuration of a source, the target or a judge: the model's own or, where that is not here, a bundled one.

    Raises:
        DataError: neither is there, or it cannot be read.
    """
    location, options = weights_of(model)
    here = Path(location).exists() or isinstance(
        try_to_load_from_cache(location, "config.json", revision=model.revision), str
    )
    bundled = CONFIGS / f"{location.replace('/', '--')}.json"
    if not here and bundled.is_file():
        content = read_json(bundled)
        config = AutoConfig.for_model(**content)
        return Architecture(model.name, config, kind, here=False, bundled=True)
    config = read_config(model.name, location, options)
    return Architecture(model.name, config, kind, here, bundled=False, trust_remote_code=model.trust_remote_code)
