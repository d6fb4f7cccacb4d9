"""Writes and reads the checkpoints of a training run, as safetensors and JSON files; pickle is never used.

A checkpoint is a directory `step-NNNNNN`. It is written under a temporary name and renamed when all of it is on the disk. The
order of the data and the learning rate follow from the seed and the step, so that the weights, AdamW's moments, the random
states and the step are the whole state: on a CPU a resumed run repeats the uninterrupted one bit for bit. If the files of a
checkpoint do not have the sha256 that was recorded, a warning says so and the checkpoint before it is used.
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
    """Writes the checkpoint `directory/step-NNNNNN` and deletes all but the newest `keep` checkpoints.

    `state` is kept with it, in state.json. The path of the checkpoint is returned.
    """
    final = directory / f"step-{step:06d}"
    temporary = directory / f".step-{step:06d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, step, model, optimizer, state)
    except BaseException:  # for instance a full disk, which an unfinished checkpoint must not fill
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
    """Writes the files of a checkpoint. state.json is the last of them, and records the hashes of the others."""
    # The optimizer's state is stored under the names of the parameters, which it does not know itself.
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{names[id(parameter)]}/{key}": torch.as_tensor(values[key]).detach().cpu().contiguous()
        for parameter, values in optimizer.state.items()
        for key in OPTIMIZER_KEYS
    }
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()
    files = {
        "model.safetensors": save(
            {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
        ),
        "optimizer.safetensors": save(moments),
        "random.safetensors": save(random),
    }
    for name, data in files.items():
        write_atomic(directory / name, data)
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    write_json(directory / "state.json", {"step": step, "sha256": digests, **state})


def newest_step(directory: Path) -> int:
    """Returns the step of the newest checkpoint, which its name says; 0 where there is none. No file is checked."""
    steps = [path.name.removeprefix("step-") for path in directory.glob("step-*") if (path / "state.json").exists()]
    return max((int(step) for step in steps if step.isdecimal()), default=0)


def load_newest(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """Restores the newest intact checkpoint into the model and the optimizer.

    The checkpoint's state is returned, or None where there is no intact checkpoint.
    """
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
    """Copies the contents of a checkpoint's files into the model, the optimizer and the random generators."""
    weights, moments, random = (load(files[f"{name}.safetensors"]) for name in ("model", "optimizer", "random"))
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])
        if f"{name}/step" in moments:
            # AdamW keeps its count of steps on the CPU, and the moments beside the parameter.
            optimizer.state[parameter] = {
                key: moments[f"{name}/{key}"].to("cpu" if key == "step" else parameter.device) for key in OPTIMIZER_KEYS
            }
    torch.set_rng_state(random["torch"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
