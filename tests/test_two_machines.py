"""Runs and preparations on two machines that share a file system, as far as one machine can stand for two.

Two launchers find each other on two ports. Two preparations run in two containers, each with a host name, a process 1 and a boot of
its own. What they share is a folder of this machine, or one that each has mounted by sshfs, over which the locks of one do not reach
the other.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, small_run

from profuser.prepare.phases import prepare
from profuser.store.lease import FOLDER
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


def sftp_server() -> str:
    """Returns the command of the server that sshfs talks to, as OpenSSH's packages install it; skips the test where it is not there."""
    found = [
        path for path in ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server") if Path(path).exists()
    ]
    if not found or shutil.which("sshfs") is None:
        pytest.skip("needs sshfs and OpenSSH's sftp-server")
    return found[0]


@pytest.fixture(params=["a folder", "sshfs"])
def shared(request, tmp_path) -> Generator[tuple[Path, Path, Path]]:
    """A folder, and the two paths under which two machines see it."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "--pid", "--fork", "true"], check=False).returncode:
        pytest.skip("containers are made by unshare, as root")
    folder = tmp_path / "shared"
    folder.mkdir()
    if request.param == "a folder":
        yield folder, folder, folder
        return
    server = tmp_path / "server.sh"  # sshfs starts it as if it were ssh, with a host and more
    server.write_text(f"#!/bin/sh\nexec {sftp_server()}\n")
    server.chmod(0o755)
    mounts = tmp_path / "one", tmp_path / "two"
    for mount in mounts:
        mount.mkdir()
        subprocess.run(["sshfs", "-o", f"ssh_command={server},dir_cache=no", f"here:{folder}", mount], check=True)
    yield folder, *mounts
    for mount in mounts:
        subprocess.run(["umount", "--lazy", mount], check=True)


def prepare_on_machine(name: str, place: Path, *arguments: str) -> subprocess.Popen:
    """Starts a preparation in a container; its end is that of all in it."""
    (place / name).write_text(f"boot of {name}\n")
    script = f'hostname {name} && mount --bind {place / name} /proc/sys/kernel/random/boot_id && exec "$@"'
    container = ["unshare", "--uts", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "sh", "-c"]
    return subprocess.Popen(
        [*container, script, "sh", sys.executable, "-m", "profuser.prepare", *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_machines_prepare_one_store_of_which_one_is_lost(shared, tmp_path):
    folder, *seen = shared
    run = small_run(tmp_path, "--capture.shard_size=1")
    whole = prepare(run)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(run.recipe.to_dict()))
    first, second = (
        prepare_on_machine(name, tmp_path, "--config", f"{tmp_path / 'recipe.yaml'}", "--store", f"{mount / 'store'}")
        for name, mount in zip(("machine-one", "machine-two"), seen, strict=True)
    )
    while len(list((folder / "store").glob("*/[!.]*.safetensors"))) < 60:
        ended = [process for process in (first, second) if process.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        time.sleep(0.02)
    first.kill()
    said = second.communicate(timeout=400)[0]
    assert second.returncode == 0, said
    assert any("sharing the work" in text for text in (said, first.communicate()[0]))
    assert Store.open(folder / "store").digests == whole.digests
    assert not [path for path in (folder / "store").rglob(".*.tmp") if path.parent.name != FOLDER]
