"""The configuration of each decoder layer of a model."""

from __future__ import annotations

from transformers import PreTrainedConfig


def configs_of_layers(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """Returns the configuration of each layer. Where layers differ, as Gemma 4's do, that of the model says no more than they share."""
    text = config.get_text_config()
    return [*(getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers)]
