"""Writes and reads the checkpoints of a training run, as safetensors and JSON files; pickle is never used.

A checkpoint is a directory `step-NNNNNN`. It is written under a temporary name and renamed when all of it is on the disk. The
order of the data and the learning rate follow from the seed and the step, so that the weights, AdamW's moments, the random
states and the step are the whole state: on a CPU a resumed run repeats the uninterrupted one bit for bit. The metrics up to the
step lie beside them. state.json is the checkpoint's record (profuser.store.sealed). A checkpoint of which anything is not what
was written is passed over for the one before, and a line says why.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from profuser.errors import DataError
from profuser.store.files import sync_directory, temporary_beside, write_atomic
from profuser.store.sealed import FILE, digest_of, unsealed, write_sealed
from profuser.train.run_record import METRICS
from profuser.typed import COUNT, parsed

OPTIMIZER_KEYS = ("exp_avg", "exp_avg_sq", "step")
FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors", METRICS)
STATE = {"step": COUNT, "targets": str, "files": {name: FILE for name in FILES}}
"""The shape of state.json."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds beside the state of the model, the optimizer and the random generators.

    step: how many steps are done. targets: the digest of the targets that they were trained on.
    metrics: the content of metrics.jsonl up to this step.
    """

    step: int
    targets: str
    metrics: bytes


def save_checkpoint(
    directory: Path, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer, keep: int
) -> Path:
    """Writes the checkpoint `directory/step-NNNNNN` and deletes all but the newest `keep` checkpoints; returns its path."""
    final = directory / f"step-{checkpoint.step:06d}"
    temporary = temporary_beside(final)
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        _write(temporary, checkpoint, model, optimizer)
        _remove(final)  # one that was passed over
        temporary.rename(final)
    finally:  # for instance of a full disk, which an unfinished checkpoint must not fill
        _remove(temporary)
    sync_directory(directory)
    # Those of later steps were passed over as well, and will be made again.
    kept = [path for path in checkpoints(directory) if step_of(path) <= checkpoint.step][-max(1, keep) :]
    for path in checkpoints(directory):
        if path not in kept:
            _remove(path)
    return final


def _write(directory: Path, checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Writes the files of a checkpoint. state.json is the last of them, and records the digests of the others."""
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
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in model.named_parameters()}
    contents = [save(weights), save(moments), save(random), checkpoint.metrics]
    digests = {}
    for name, data in zip(FILES, contents, strict=True):
        write_atomic(directory / name, data)
        digests[name] = digest_of(data)
    state = {"step": checkpoint.step, "targets": checkpoint.targets, "files": digests}
    write_sealed(directory / "state.json", state)


def checkpoints(directory: Path) -> list[Path]:
    """Returns the paths of all checkpoints in ascending order. No file is checked."""
    found = [path for path in directory.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name, re.ASCII)]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Returns the step that the name of a checkpoint says."""
    return int(path.name.removeprefix("step-"))


def newest_step(directory: Path) -> int:
    """Returns the step of the newest checkpoint, which its name says; 0 where there is none. No file is checked."""
    return max((step_of(path) for path in checkpoints(directory) if (path / "state.json").exists()), default=0)


def load_newest(directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint | None:
    """Restores the newest intact checkpoint into the model and the optimizer, and returns the rest of it.

    For each checkpoint that is passed over, a line says why. Where none is intact, this returns None.

    Raises:
        DataError: the checkpoint holds other weights than the model has.
    """
    there = checkpoints(directory)
    for path in reversed(there):
        try:
            checkpoint, files = _read(path)
        except (OSError, ValueError) as error:
            print(f"checkpoint {path} is damaged ({error}): trying the one before", flush=True)
            continue
        _restore(path, files, model, optimizer)
        return checkpoint
    if there:
        print(f"no intact checkpoint is left in {directory}: beginning at step 0", flush=True)
    return None


def _read(path: Path) -> tuple[Checkpoint, dict[str, bytes]]:
    """Reads a checkpoint and its files. It raises OSError or ValueError where anything is not what was written."""
    try:
        state = unsealed(parsed((path / "state.json").read_bytes()), STATE)
    except ValueError as error:
        raise ValueError(f"state.json must hold {error}") from None
    if state["step"] != step_of(path):
        raise ValueError(f"its name must say its step, state.json says {state['step']}")
    files = {name: (path / name).read_bytes() for name in FILES}
    for name, data in files.items():
        if digest_of(data) != state["files"][name]:
            raise ValueError(f"{name} must hold what was written, its sha256 differs")
    return Checkpoint(state["step"], state["targets"], files[METRICS]), files


@torch.no_grad()
def _restore(path: Path, files: Mapping[str, bytes], model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copies the contents of a checkpoint's files into the model, the optimizer and the random generators."""
    weights, moments, random = (load(files[f"{name}.safetensors"]) for name in ("model", "optimizer", "random"))
    parameters = dict(model.named_parameters())
    if other := sorted(n for n in {*weights, *parameters} if _shape(weights.get(n)) != _shape(parameters.get(n))):
        raise DataError(
            f"checkpoint {path} must hold the weights of the target, {other[0]} differs ({len(other)} in all); use the versions "
            "that run.json names, or start over with --fresh"
        )
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])
        if f"{name}/step" in moments:
            # AdamW keeps its count of steps on the CPU, and the moments beside the parameter.
            optimizer.state[parameter] = {
                key: moments[f"{name}/{key}"].to("cpu" if key == "step" else parameter.device) for key in OPTIMIZER_KEYS
            }
    torch.set_rng_state(random["torch"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _remove(path: Path) -> None:
    """Removes a checkpoint, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
