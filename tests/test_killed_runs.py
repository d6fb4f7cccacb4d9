"""SIGKILL at random moments: the run that goes on ends with the bits of one that was never interrupted.

`PROFUSER_KILLS=20 python -m pytest tests/test_killed_runs.py -m long` kills each run so many times, which is 40 otherwise.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_runs import children
from conftest import ROOT

from profuser.train.checkpoint import newest_step

pytestmark = pytest.mark.long

KILLS = int(os.environ.get("PROFUSER_KILLS", "40"))
STEPS = 3 * KILLS + 10
ALONE = [sys.executable, "-m", "profuser.train"]
SHARDED = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "profuser.train", "--optim.shard=true",
]  # fmt: skip
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}


def finished(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("beside", ["false", "true"], ids=["between the steps", "beside the next step"])
@pytest.mark.parametrize("launcher", [ALONE, SHARDED], ids=["one process", "two that shard"])
def test_a_killed_run_ends_with_the_bits_of_an_uninterrupted_one(prepared, tmp_path, launcher, beside):
    """SIGKILL takes the run and all it has started, in a step or in the middle of a checkpoint, of which there is one every step.

    The checkpoints are written between the steps, or beside the next one.
    """
    directory, run, _ = prepared
    arguments = [
        f"--data.train={run.recipe.data.train}", f"--data.validation={run.recipe.data.validation}",
        f"--data.heldout={run.recipe.data.heldout}", f"--store={directory / 'store'}", "--generation.max_new_tokens=24",
        "--capture.shard_size=5", f"--optim.steps={STEPS}", "--optim.batch_size=3", "--optim.micro_batch_size=1", "--optim.log_every=1",
        "--optim.eval_every=0", "--optim.checkpoint_every=1", f"--optim.async_checkpoints={beside}",
    ]  # fmt: skip
    finished([*launcher, *arguments, f"--output={tmp_path / 'whole'}"])
    rng, output, inside = random.Random(16), tmp_path / "killed", 0
    for kill in range(KILLS):
        process = subprocess.Popen(
            [*launcher, *arguments, f"--output={output}"], env=ENVIRONMENT, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        goal, deadline = newest_step(output / "checkpoints") + rng.randint(1, 2), time.monotonic() + 300
        while newest_step(output / "checkpoints") < goal:
            assert process.poll() is None, kill
            assert time.monotonic() < deadline
            time.sleep(0.005)
        if kill % 2:  # in a checkpoint that is being written
            while not half_written(output) and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.0005)
        else:
            time.sleep(rng.uniform(0, 0.1))
        for one in [process.pid, *children(process.pid)]:
            os.kill(one, signal.SIGKILL)
        process.wait()
        inside += half_written(output)
    assert "resuming at step" in finished([*launcher, *arguments, f"--output={output}"])
    print(f"{KILLS} kills, {inside} of them in the middle of a checkpoint")
    assert inside >= KILLS // 4

    assert (output / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    untimed = {"tokens_per_second", "data_wait", "sha256"}
    lines = [
        [
            {key: value for key, value in json.loads(line).items() if key not in untimed}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (output, tmp_path / "whole")
    ]
    assert len(lines[0]) >= STEPS
    assert lines[0] == lines[1]
    assert not list(output.rglob(".*.tmp"))


def half_written(output: Path) -> bool:
    """Whether there is a checkpoint that has not got its name."""
    return any(path.name.startswith(".") for path in (output / "checkpoints").iterdir())
