"""A target that DeepSpeed divides learns what a whole one learns, and its checkpoints are those of any other run.

`make test-deepspeed` installs DeepSpeed and runs these tests. Those that need it are skipped where it is not installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from command_runs import children
from conftest import ROOT
from test_sharding import guardian

from profuser.cli import explained
from profuser.errors import ConfigError
from profuser.recipe.optim import OptimConfig
from profuser.train.parallel import launch
from profuser.train.zero import check_zero, is_zero, put_state, shape_of

with_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is not installed")
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


def asking_for(stage: int | None) -> dict[str, str]:
    """The environment in which `accelerate launch` starts processes for a stage of ZeRO; None asks for no DeepSpeed."""
    if stage is None:
        return ENVIRONMENT
    return ENVIRONMENT | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


def finished(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# -- what is refused ----------------------------------------------------------------------------------------------------


def asked(precision: str = "no", **config: Any) -> Any:
    """What `check_zero` reads of an Accelerator with a DeepSpeed configuration."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}} | config)
    return SimpleNamespace(deepspeed_plugin=plugin, num_processes=2, mixed_precision=precision)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto", "steps_per_print": 1e9},
        {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "fp16": {"enabled": False}, "bf16": {"enabled": "auto"}},
        {"zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1e7, "offload_optimizer": {"device": "none"}}},
    ],
)  # fmt: skip
def test_what_a_configuration_may_say(config):
    check_zero(asked(**config), OptimConfig())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"zero_optimization": {"stage": 1}}, "must divide by ZeRO-2 or ZeRO-3, got zero_stage: 1; set it to 2 or 3"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps must be what the recipe says.*got 4;.* set it to 1$"),
        ({"gradient_clipping": 0.5}, "gradient_clipping must be what the recipe says.*got 0.5;.* set it to 1.0$"),
        ({"fp16": {"enabled": True}}, "fp16.enabled must be what the recipe says.*got True;.* set it to False$"),
        ({"bf16": {"enabled": True}}, "bf16.enabled must be what the recipe says.*got True;.* set it to False$"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type must be.*got 'Adam'; take it out of its configuration$"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.type must be.*got 'WarmupLR'; take it out"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/nvme"}}},
            "zero_optimization.offload_param.device must be.*got 'nvme';.* set it to 'none'$",
        ),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights must be.*got True"),
    ],
)  # fmt: skip
def test_a_configuration_that_asks_for_something_else_is_refused_in_one_line(config, said):
    with pytest.raises(ConfigError, match=said) as error:
        check_zero(asked(**config), OptimConfig())
    assert "\n" not in str(error.value)


def test_a_configuration_may_say_what_the_recipe_and_its_launcher_say():
    config = {"gradient_clipping": 0.5, "train_batch_size": 2, "bf16": {"enabled": True}, "scheduler": None}
    check_zero(asked("bf16", **config), OptimConfig(grad_clip=0.5))
    with pytest.raises(ConfigError, match=r"set it to 1\.0$"):
        check_zero(asked("bf16", **config), OptimConfig())


def test_a_parameter_is_divided_where_deepspeed_has_marked_it():
    """ZeRO-3 has its shape elsewhere, and ZeRO-2 leaves it whole."""
    parameters: list[Any] = [torch.nn.Parameter(torch.ones(0)) for _ in range(3)]
    plain, whole, divided = parameters
    whole._hp_mapping = divided.ds_id = 1
    divided.ds_shape = torch.Size([2, 3])
    assert list(map(is_zero, parameters)) == [False, True, True]
    assert [is_zero(torch.nn.ParameterList([plain, parameter])) for parameter in (plain, whole)] == [False, True]
    assert (shape_of(divided), shape_of(whole)) == ((2, 3), (0,))


def test_weights_that_were_changed_a_different_number_of_times_are_refused():
    steps = {"a/step": torch.tensor(2.0), "b/step": torch.tensor(3.0)}
    with pytest.raises(ConfigError, match="changed equally often under DeepSpeed, got 2 different counts"):
        put_state(torch.nn.Linear(1, 1), None, {}, steps)


def test_without_a_launcher_or_deepspeed_a_line_says_what_to_do(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="started by a launcher"):
        launch("fp32")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ModuleNotFoundError) as error:
        launch("fp32")
    assert "pip install 'profuser[deepspeed]'" in str(explained(error.value))


def test_the_configurations_for_accelerate_ask_for_their_stage():
    for stage in (2, 3):
        path = ROOT / f"profuser/recipes/accelerate/8gpus-zero{stage}.yaml"
        config = yaml.safe_load(path.read_text())
        assert (config["distributed_type"], config["num_processes"]) == ("DEEPSPEED", 8)
        assert config["deepspeed_config"] == {"zero_stage": stage}


# -- beside a whole target ----------------------------------------------------------------------------------------------


@with_deepspeed
@pytest.mark.parametrize(
    ("stage", "is_tied", "precision"),
    [
        (2, True, "fp32"),
        (3, True, "fp32"),
        pytest.param(3, False, "fp32", marks=pytest.mark.long),
        pytest.param(2, True, "bf16", marks=pytest.mark.long),
        pytest.param(3, True, "bf16", marks=pytest.mark.long),
    ],
)
def test_gradients_steps_and_checkpoints_are_those_of_a_whole_target(prepared, tmp_path, stage, is_tied, precision):
    model = guardian(tmp_path / "guardian", is_tied=is_tied)
    command = [sys.executable, str(ROOT / "tests/forked.py"), "2", "zero_steps", str(prepared[2].directory)]
    output = finished([*command, str(tmp_path), model, precision], asking_for(stage))
    found = json.loads(output.splitlines()[-1])
    assert (found["world"], found["stage"]) == (2, stage)
    assert found["held"] == (1 if stage == 2 else 0)  # of the weights that are computed with, between the passes
    for layout in ("packed", "padded"):
        step = found[layout]
        assert step["passes"] > 1
        assert step["error"] <= 2 * step["plain_error"]
        assert step["norm"] == pytest.approx(1, rel=1e-5 if precision == "fp32" else 1e-2)
    true = (
        "loaded", "shapes", "unmoved", "restored", "resumed", "restored_beside", "resumed_beside", "into_whole", "into_shards",
        "moments", "refused", "exported",
    )  # fmt: skip
    assert [name for name in true if not found[name]] == []
    assert found["whole_step"] <= (1e-3 if precision == "fp32" else 0.05)  # of what the step changes
    assert found["tied"] == is_tied
    assert len([name for name in found["files"] if name.startswith("shard-")]) == 2


@with_deepspeed
@pytest.mark.long
def test_zero_one_process_and_fsdp_go_on_with_each_others_checkpoints(prepared, tmp_path):
    """Each does two steps of eight, whose losses are those of a process that does all of them."""
    recipe = prepared[1].recipe.to_dict()
    recipe |= {"optim": recipe["optim"] | {"shard": True, "lr": 1e-3, "batch_size": 8, "steps": 8}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))

    def some_steps(processes: int, stage: int | None, run: str, steps: int) -> dict[str, Any]:
        (tmp_path / run).mkdir(exist_ok=True)
        launcher = [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]
        arguments = [str(tmp_path / "recipe.json"), str(prepared[2].directory), str(tmp_path / run), str(steps)]
        output = finished([*launcher, str(ROOT / "tests/resharded_steps.py"), *arguments], asking_for(stage))
        return json.loads(output.splitlines()[-1])

    found = [some_steps(*way, "run", 2) for way in ((2, 3), (1, None), (3, 2), (2, None))]
    assert [(each["processes"], each["start"]) for each in found] == [(2, 0), (1, 2), (3, 4), (2, 6)]
    alone = some_steps(1, None, "alone", 8)["losses"]
    assert [loss for each in found for loss in each["losses"]] == pytest.approx(alone, rel=1e-5)  # rounding adds up


@with_deepspeed
@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("way", ["whole", "adapter"])
def test_a_killed_run_goes_on_bit_for_bit(prepared, tmp_path, stage, way):
    """SIGKILL takes both processes after the first checkpoint. Also with an adapter, recomputed activations and the best weights."""
    run = prepared[1].recipe
    arguments = [
        *TORCHRUN, "2", "-m", "profuser.train", f"--data.train={run.data.train}", f"--data.validation={run.data.validation}",
        f"--data.heldout={run.data.heldout}", f"--store={prepared[2].directory}", "--generation.max_new_tokens=24",
        "--capture.shard_size=5", "--align.keep=all", "--optim.steps=12", "--optim.batch_size=3", "--optim.micro_batch_size=1",
        "--optim.log_every=1", "--optim.checkpoint_every=2", "--optim.eval_every=4", "--optim.async_checkpoints=true",
    ]  # fmt: skip
    if way == "adapter":
        arguments += ["--adapter.rank=4", "--optim.gradient_checkpointing=true", "--optim.export=best"]
    environment = asking_for(stage)
    said = finished([*arguments, f"--output={tmp_path / 'whole'}"], environment)
    assert "2 processes" in said
    assert f"ZeRO-{stage}: of the processes each holds 1/2" in said
    output = tmp_path / "killed"
    with subprocess.Popen(
        [*arguments, f"--output={output}"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        deadline = time.monotonic() + 300
        while not list(output.glob("checkpoints/step-*/state.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for child in children(process.pid):
            os.kill(child, signal.SIGKILL)
        process.kill()
    assert "resuming at step" in finished([*arguments, f"--output={output}"], environment)

    def lines(place: Path) -> list[dict[str, Any]]:
        timed = ("tokens_per_second", "data_wait", "sha256")
        read = map(json.loads, (place / "metrics.jsonl").read_text().splitlines())
        return [{key: value for key, value in line.items() if key not in timed} for line in read]

    assert lines(output) == lines(tmp_path / "whole")
    names = ["model.safetensors", *(["adapter/adapter_model.safetensors"] if way == "adapter" else [])]
    for name in names:
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
