"""What is found out before anything is prepared: whether the target can have the recipe's loss, from its configuration alone."""

import json
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
        DataError, match=r"target: a model must be loadable as AutoModelForCausalLM, .* 't5', which is not"
    ):
        check(tmp_path, "t5")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**7}, "a model must have at most .* layers"),
        ({"num_attention_heads": 5}, "no model's configuration could be read"),
        ({"model_type": "nosuch"}, "no model's configuration could be read"),
        ({"hidden_act": "nosuch"}, "no causal language model could be built as the configuration of .* says"),
    ],
)
def test_a_target_with_a_wrong_configuration_is_one_line(tmp_path, change, said):
    """It is the first that a run reads of its target."""
    config = AutoConfig.for_model("llama", **SIZES).to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = replace(parse_run("train", []).recipe, target=str(tmp_path))
    with pytest.raises(DataError, match=rf"target: {said}"):
        check_training(recipe, torch.device("cpu"), sharded=False)
