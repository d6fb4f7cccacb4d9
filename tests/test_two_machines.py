"""A run whose processes are started by two launchers, as on two machines that share a file system. Both run here, on two ports."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT, small_run

from profuser.prepare.phases import prepare
from profuser.store.store import Store
from profuser.train.checkpoint import newest_step

pytestmark = pytest.mark.long


def launch(port: int, processes: int, *arguments: str) -> list[subprocess.Popen]:
    """Starts two launchers that find each other, each with its processes."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    launcher = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(processes), "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"localhost:{port}", "-m", "profuser.train", *arguments,
    ]  # fmt: skip
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return [subprocess.Popen(launcher, env=environment, start_new_session=True, **streams) for _ in range(2)]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_two_launchers_make_one_store_and_one_run_and_others_go_on_with_it(tmp_path):
    run = small_run(tmp_path, "--optim.shard=true", "--optim.steps=200", "--optim.checkpoint_every=10")
    arguments = [
        f"--data.train={run.recipe.data.train}", f"--data.validation={run.recipe.data.validation}",
        f"--data.heldout={run.recipe.data.heldout}", f"--store={run.store_dir}", f"--output={tmp_path / 'run'}",
        "--generation.max_new_tokens=24", "--capture.shard_size=5", "--align.keep=all", "--optim.shard=true", "--optim.steps=200",
        "--optim.batch_size=4", "--optim.micro_batch_size=1", "--optim.eval_every=0", "--optim.checkpoint_every=10",
    ]  # fmt: skip
    # Two processes, one with each launcher. Both launchers are lost once there is a checkpoint.
    first = launch(free_port(), 1, *arguments)
    start = time.monotonic()
    while not newest_step(Path(tmp_path / "run" / "checkpoints")) and time.monotonic() < start + 240:
        assert all(launcher.poll() is None for launcher in first), first[0].communicate()
        time.sleep(0.1)
    subprocess.run(["pkill", "-KILL", "-f", f"output={tmp_path / 'run'}"], check=True)  # what they have started as well
    assert any("each holds 1/2" in launcher.communicate()[0] for launcher in first)

    # Four go on, two with each.
    again = launch(free_port(), 2, *arguments)
    said = [launcher.communicate(timeout=300)[0] for launcher in again]
    assert [launcher.returncode for launcher in again] == [0, 0], said
    assert any("resuming at step" in text and "fused model" in text for text in said), said
    assert any("each holds 1/4" in text for text in said)
    alone = prepare(replace(run, recipe=replace(run.recipe, store=str(tmp_path / "alone"))))
    assert Store.open(run.store_dir).digests == alone.digests
