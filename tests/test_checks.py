"""What is found out before anything is prepared: whether the target can have the recipe's loss, from its configuration alone."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

from profuser.errors import ConfigError, DataError
from profuser.recipe.parse import parse_run
from profuser.train.checks import check_training

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
}


def check(folder, architecture, *options, **config):
    """Checks the demo's recipe with a target of which there is nothing but the configuration."""
    AutoConfig.for_model(architecture, **SIZES | config).save_pretrained(folder)
    recipe = replace(parse_run("train", list(options)).recipe, target=str(folder))
    check_training(recipe, torch.device("cpu"), sharded=False)


def test_a_loss_that_the_targets_softcap_rules_out_is_refused(tmp_path):
    both = ("--optim.left_out=0.003", "--optim.label_smoothing=0.1")
    with pytest.raises(ConfigError, match=r"optim\.left_out must be 0 with label_smoothing under a softcap"):
        check(tmp_path, "gemma2", *both, final_logit_softcapping=30.0)
    check(tmp_path, "gemma2", both[0], final_logit_softcapping=30.0)
    check(tmp_path, "llama", *both)


def test_a_target_that_the_loss_cannot_train_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"output_router_logits = False"):
        check(tmp_path, "mixtral", output_router_logits=True)
    with pytest.raises(
        DataError, match=r"target: a model must be a causal language model, .* is none that transformers knows"
    ):
        check(tmp_path, "t5")
