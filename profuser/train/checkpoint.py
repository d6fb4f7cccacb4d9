"""Checkpoints of a training run: safetensors and JSON, atomic, never pickle.

A checkpoint is a directory `step-NNNNNN` written under a temporary name and renamed when all of it is on disk. The data
order and the learning rate are functions of (seed, step), so weights, AdamW's moments, the random states and the step
are the whole state: a resumed run repeats the uninterrupted one bit for bit on a CPU. A checkpoint whose files do not
match their recorded sha256 is passed over, with a warning, for the newest one that does.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import nn

from profuser.store.files import write_atomic, write_json

OPTIMIZER_KEYS = ("exp_avg", "exp_avg_sq", "step")


def save_checkpoint(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `directory/step-NNNNNN` and delete all but the newest `keep` checkpoints."""
    final = directory / f"step-{step:06d}"
    temporary = directory / f".step-{step:06d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, step, model, optimizer, state)
    except BaseException:  # a full disk, say: what does not count must not fill it
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    for old in sorted(directory.glob("step-*"))[: -max(1, keep)]:
        shutil.rmtree(old)
    return final


def _write(
    directory: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    names = {id(p): n for n, p in model.named_parameters()}
    moments = {
        f"{names[id(p)]}/{key}": torch.as_tensor(values[key]).detach().cpu().contiguous()
        for p, values in optimizer.state.items()
        for key in OPTIMIZER_KEYS
    }
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    files = {
        "model.safetensors": save({n: p.detach().cpu().contiguous() for n, p in model.named_parameters()}),
        "optimizer.safetensors": save(moments),
        "random.safetensors": save(random),
    }
    for name, data in files.items():
        write_atomic(directory / name, data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_json(directory / "state.json", {"step": step, "sha256": digests, **state})


def newest_step(directory: Path) -> int:
    """The step of the newest checkpoint by its name; 0 without any."""
    steps = [path.name.removeprefix("step-") for path in directory.glob("step-*") if (path / "state.json").exists()]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def load_newest(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restore the newest complete checkpoint into model and optimizer; its state, or None when there is none."""
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            state = json.loads((path / "state.json").read_text())
            files = {name: (path / name).read_bytes() for name in state["sha256"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"checkpoint {path} is not complete ({error}): trying the one before", flush=True)
            continue
        if any(hashlib.sha256(data).hexdigest() != state["sha256"][name] for name, data in files.items()):
            print(f"checkpoint {path} is damaged: trying the one before", flush=True)
            continue
        _restore(files, model, optimizer)
        return state
    return None


@torch.no_grad()
def _restore(files: dict[str, bytes], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    weights, moments, random = (load(files[f"{n}.safetensors"]) for n in ("model", "optimizer", "random"))
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
        if f"{name}/step" in moments:
            optimizer.state[parameter] = {
                key: moments[f"{name}/{key}"].to("cpu" if key == "step" else parameter.device) for key in OPTIMIZER_KEYS
            }
    torch.set_rng_state(random["torch"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
