"""FusionModel in Hugging Face's Trainer and TRL's SFTTrainer: accumulation, evaluation, checkpoints and saving."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from small_tokenizers import pretrained_tokenizer
from test_fusion_model import demo_model, examples, lora, padded, tied_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from profuser import FusionModel
from profuser.recipe.places import resolve

EXAMPLES = examples((7, 5, 9, 6, 4, 8, 3, 8))  # they have different numbers of labels


def trained(
    fusion: FusionModel,
    directory: Path,
    batch_size: int = 8,
    trainer: Callable[..., Trainer] = Trainer,
    arguments: Callable[..., TrainingArguments] = TrainingArguments,
    resume: bool = False,
    **options: Any,
) -> Trainer:
    """A trainer after two steps, or as many as the options say, on all examples."""
    plain: dict[str, Any] = {
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 8 // batch_size,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "bf16": False,
    }
    data = Dataset.from_list([{k: v.tolist() for k, v in e.items()} for e in EXAMPLES]).with_format("torch")
    done = trainer(
        fusion,
        arguments(str(directory), **plain | options),
        train_dataset=data,
        eval_dataset=data,
        data_collator=padded,
        processing_class=pretrained_tokenizer(resolve("demo:guardian")),
    )
    done.train(resume_from_checkpoint=resume)
    return done


def model_of(done: Trainer) -> Any:
    """The trainer's FusionModel, typed as Any because it also has the attributes of the model inside."""
    return done.model


def losses(done: Trainer) -> list[float]:
    return [line["loss"] for line in done.state.log_history if "loss" in line]


@pytest.mark.parametrize("make", [demo_model, pytest.param(tied_model, marks=pytest.mark.long)], ids=["untied", "tied"])
def test_gradient_accumulation_and_checkpointing_change_nothing(make, tmp_path):
    whole = trained(FusionModel(make()), tmp_path / "whole", optim="sgd")
    torch.testing.assert_close(
        whole.state.log_history[0]["loss"], FusionModel(make())(**padded(EXAMPLES))["loss"].item(), rtol=1e-5, atol=1e-5
    )
    for name, checkpointing in (("parts", False), ("checkpointing", True)):
        parts = trained(FusionModel(make()), tmp_path / name, 2, optim="sgd", gradient_checkpointing=checkpointing)
        torch.testing.assert_close(losses(parts), losses(whole), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model_of(parts).state_dict(), model_of(whole).state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [pytest.param(demo_model, marks=pytest.mark.long), tied_model], ids=["untied", "tied"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(make, tmp_path):
    trained(FusionModel(make()), tmp_path, max_steps=1)
    resumed = trained(FusionModel(make()), tmp_path, resume=True)
    whole = trained(FusionModel(make()), tmp_path / "whole")
    torch.testing.assert_close(model_of(resumed).state_dict(), model_of(whole).state_dict(), rtol=0, atol=0)


def test_evaluation_is_the_mean_over_the_labels_and_the_saved_model_loads(tmp_path):
    done = trained(FusionModel(demo_model()), tmp_path)
    with torch.no_grad():
        expected = model_of(done)(**padded(EXAMPLES))["loss"].item()
    assert done.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    model_of(done).save_pretrained(tmp_path / "final")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    torch.testing.assert_close(loaded.state_dict(), model_of(done).model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("adapt", [None, lora], ids=["full", "lora"])
def test_trls_trainer_takes_the_same_steps(adapt, tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")

    class FusionTrainer(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    def fusion():
        model = demo_model()
        return FusionModel(adapt(model, target_modules=["q_proj"]) if adapt else model)

    columns = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    ours = trained(fusion(), tmp_path / "trl", 2, FusionTrainer, trl.SFTConfig, **columns)
    plain = trained(fusion(), tmp_path / "plain", 2)
    torch.testing.assert_close(losses(ours), losses(plain), rtol=1e-5, atol=1e-5)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-3)


def test_trls_trainer_with_a_loss_of_its_own_is_an_error(tmp_path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    columns = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    with pytest.raises(AttributeError, match=r"compute_loss = transformers\.Trainer\.compute_loss"):
        trained(FusionModel(demo_model()), tmp_path, 2, trl.SFTTrainer, trl.SFTConfig, **columns)


@pytest.mark.long
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    one = trained(FusionModel(demo_model()), tmp_path / "one", optim="sgd")
    two = torch.load(tmp_path / "two.pt")
    assert two["world_size"] == 2
    torch.testing.assert_close(two["losses"], losses(one), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(two["weights"], model_of(one).state_dict(), rtol=1e-4, atol=1e-5)


if __name__ == "__main__":  # one rank of the test above
    directory = Path(sys.argv[1])
    # Two accumulated passes of two examples on each of two ranks are the eight examples of one pass.
    options = {"gradient_accumulation_steps": 2, "gradient_checkpointing": True, "optim": "sgd"}
    rank = trained(FusionModel(demo_model()), directory / "two", batch_size=2, **options)
    if rank.args.process_index == 0:
        result = {"losses": losses(rank), "weights": model_of(rank).state_dict(), "world_size": rank.args.world_size}
        torch.save(result, directory / "two.pt")
