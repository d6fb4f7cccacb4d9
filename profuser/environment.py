"""Describes what a run ran on, for run.json and for published figures: versions, hardware and commit."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from profuser.owned_memory import OwnedMemory

PACKAGES = (
    "profuser",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "numpy",
)


def environment() -> dict[str, Any]:
    """Returns versions, hardware and commit."""
    return {"versions": versions(), "hardware": hardware(), "commit": commit()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """Returns the name of the GPU, or the name of the CPU and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (
                line.split(":")[1].strip()
                for line in info.read_text(encoding="utf-8").splitlines()
                if line.startswith("model name")
            ),
            cpu,
        )
    return f"{cpu}, {threads()}"


def threads() -> str:
    """Returns how many threads torch computes with, in words."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


def peak_memory(owned: OwnedMemory) -> dict[str, int]:
    """Returns the most memory that this process has taken, in bytes.

    peak_rss_bytes is all of it. peak_owned_bytes leaves out the mapped files, which are libraries and shards: the system can drop and
    share these. peak_device_bytes is what torch took of the GPU, if there is one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss would also count the process that this one was started from, as it was before the program was loaded.
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
        peak = 1024 * int(lines["VmHWM"].split()[0])
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    found = {"peak_rss_bytes": peak, "peak_owned_bytes": peak if owned.peak is None else owned.peak}
    return found | ({"peak_device_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {})


def commit() -> str | None:
    """Returns the commit of the checkout, with a + if there are uncommitted changes. It is None for an installed package."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(["git", "-C", root, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
