"""Writes and reads the checkpoints of a training run, as safetensors and JSON files; pickle is never used.

A checkpoint is a directory `step-NNNNNN`. It is written under a temporary name and renamed when all of it is on the disk. The
order of the data and the learning rate follow from the seed and the step, so that the weights, AdamW's moments, the random
states and the step are the whole state: on a CPU a resumed run repeats the uninterrupted one bit for bit. The metrics up to the
step lie beside them. state.json is the checkpoint's record (profuser.store.sealed). A checkpoint of which anything is not what
was written is passed over for the one before, and a line says why.

One process writes whole tensors. Where the target is sharded, every process writes its shares (profuser.train.shard_files). Each form
can be read by any number of processes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor, nn

from profuser.errors import DataError
from profuser.store.files import sync_directory, temporary_beside, write_atomic
from profuser.store.sealed import FILES, FileDigest, damaged_files, digest_of, unsealed, write_sealed
from profuser.train import zero
from profuser.train.capacity import STATE as CAPACITY
from profuser.train.optimizer import MOMENTS, begin_moments, set_step
from profuser.train.run_record import METRICS
from profuser.train.shard_files import STEPS, load_shares, save_shares, sizes_in
from profuser.train.sharding import agreed, divide_again, is_main, is_sharded
from profuser.typed import COUNT, NUMBER, parsed

RANDOM = "random.safetensors"
WHOLE = ("model.safetensors", "optimizer.safetensors")
"""The files of the weights and moments in the form of one process."""
STATE = {
    "step": COUNT,
    "targets": str,
    "files": FILES,
    "window?": [{str: NUMBER}],
    "capacity?": dict.fromkeys(CAPACITY, COUNT),
}
"""The shape of state.json."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds beside the state of the model, the optimizer and the random generators.

    step: how many steps are done. targets: the digest of the targets that they were trained on.
    metrics: the content of metrics.jsonl up to this step. window: the metrics of the steps since its last line, which the next line
    will be a mean of. capacity: the state of Capacity, None where the run has none.
    """

    step: int
    targets: str
    metrics: bytes
    window: tuple[dict[str, float], ...] = ()
    capacity: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class State:
    """The tensors of a checkpoint, as they are at one moment. If they are `sharded`, each is the share of this process."""

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    steps: dict[str, Tensor]
    random: dict[str, Tensor]
    sharded: bool


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, *, copied: bool = False) -> State:
    """Returns the state of a training. If it is `copied` into the machine's memory, the training may go on meanwhile."""
    random = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state()

    if zero.is_zero(model):
        return State(*zero.state_of(model, optimizer), random, sharded=True)
    divide_again(model)

    def taken(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()} if copied else tensors

    return State(
        weights=taken(weights_of(model)),
        moments=taken(moments_of(model, optimizer)),
        steps=taken(steps_of(model, optimizer)),
        random=random,
        sharded=is_sharded(model),
    )


def save_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    keep: int,
    best: int | None = None,
) -> Path:
    """Writes the checkpoint `directory/step-NNNNNN` and deletes all but the newest `keep` checkpoints and that of step `best`.

    If the model is sharded, all processes must call it; else one. Returns the path of the checkpoint.
    """
    return write_checkpoint(directory, checkpoint, state_of(model, optimizer), keep, best)


def write_checkpoint(
    directory: Path,
    checkpoint: Checkpoint,
    state: State,
    keep: int,
    best: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Does what `save_checkpoint` does, with a state that was taken before.

    `group` is what the processes of a sharded model talk through, None for what they train with.
    """
    final = directory / f"step-{checkpoint.step:06d}"
    sharded = state.sharded
    writes = is_main() or not sharded
    temporary = temporary_beside(final)
    if writes:
        _remove(temporary)
        temporary.mkdir(parents=True)
    if sharded:  # the others learn where to write when there is an empty directory, because they would make one
        temporary = agreed(temporary, group)
    try:
        if sharded:
            digests = save_shares(temporary, state.weights | state.moments, state.steps, group)
        else:
            digests = _save_whole(temporary, state)
        if writes:
            _finish(temporary, checkpoint, state.random, digests)
            _remove(final)  # one that was passed over
            temporary.rename(final)
    finally:  # for instance of a full disk, which an unfinished checkpoint must not fill
        if writes:
            _remove(temporary)
    if writes:
        sync_directory(directory)
        # Those of later steps were passed over as well, and will be made again.
        kept = [path for path in checkpoints(directory) if step_of(path) <= checkpoint.step][-max(1, keep) :]
        for path in checkpoints(directory):
            if path not in kept and step_of(path) != best:
                _remove(path)
    return final


def _save_whole(directory: Path, state: State) -> dict[str, FileDigest]:
    """Writes the weights and moments, and returns the digests of their files."""
    digests = {}
    for name, tensors in zip(WHOLE, (state.weights, state.moments | state.steps), strict=True):
        data = save({key: tensor.cpu().contiguous() for key, tensor in tensors.items()})
        write_atomic(directory / name, data)
        digests[name] = digest_of(data)
    return digests


def _finish(directory: Path, checkpoint: Checkpoint, random: dict[str, Tensor], digests: dict[str, FileDigest]) -> None:
    """Writes the small files of a checkpoint. state.json is the last of them, and records the digests of all others."""
    for name, data in ((RANDOM, save(random)), (METRICS, checkpoint.metrics)):
        write_atomic(directory / name, data)
        digests[name] = digest_of(data)
    state: dict[str, Any] = {"step": checkpoint.step, "targets": checkpoint.targets, "files": digests}
    if checkpoint.window:
        state["window"] = list(checkpoint.window)
    if checkpoint.capacity is not None:
        state["capacity"] = checkpoint.capacity
    write_sealed(directory / "state.json", state)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters that are trained, by their names. Those that an adapter freezes are the target's own."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns AdamW's moments, such as `NAME/exp_avg` and `NAME/exp_avg_sq`, by the names of the parameters."""
    states = _states(model, optimizer)
    return {f"{name}/{key}": state[key].detach() for name, state in states for key in MOMENTS if key in state}


def steps_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Returns AdamW's counts of steps as `NAME/step`, single numbers on the CPU."""
    return {f"{name}/step": torch.as_tensor(state["step"]).detach() for name, state in _states(model, optimizer)}


def _states(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, dict[str, Any]]]:
    """Returns what the optimizer keeps of each parameter that had a gradient. It does not know their names itself."""
    return [(name, optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state]


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

    For each checkpoint that is passed over, a line says why. Where none is intact, this returns None. Of several processes, all of
    which must call it, the main one chooses.

    Raises:
        DataError: the checkpoint holds other weights than the model has.
    """
    there = list(reversed(checkpoints(directory)))
    found = _load_first(there, "the one before", model, optimizer)
    if found is None and there and is_main():
        print(f"no intact checkpoint is left in {directory}: beginning at step 0", flush=True)
    return found


def load_best(
    directory: Path, ranking: Sequence[int], model: nn.Module, optimizer: torch.optim.Optimizer
) -> Checkpoint | None:
    """Does what `load_newest` does with the first intact checkpoint of the steps of a ranking, best first."""
    there = {step_of(path): path for path in checkpoints(directory)}
    return _load_first([there[step] for step in ranking if step in there], "the next best", model, optimizer)


def _load_first(
    paths: Sequence[Path], then: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> Checkpoint | None:
    """Restores the first intact one of some checkpoints. `then` says what is tried instead of one that is damaged."""
    found = agreed(_first_intact(paths, then) if is_main() else None)
    if found is None:
        return None
    path, state = found
    divide_again(model)
    _restore(path, model, optimizer)
    metrics, window = (path / METRICS).read_bytes(), tuple(state.get("window", ()))
    return Checkpoint(state["step"], state["targets"], metrics, window, state.get("capacity"))


def _first_intact(paths: Sequence[Path], then: str) -> tuple[Path, dict[str, Any]] | None:
    for path in paths:
        try:
            return path, _proven_state(path)
        except (OSError, ValueError) as error:
            what_is_done = "" if path == paths[-1] else f": trying {then}"
            print(f"checkpoint {path} is damaged ({error}){what_is_done}", flush=True)
    return None


def _proven_state(path: Path) -> dict[str, Any]:
    """Reads the state.json of a checkpoint. It raises OSError or ValueError where anything is not what was written."""
    try:
        state = unsealed(parsed((path / "state.json").read_bytes()), STATE)
        if missing := {RANDOM, METRICS} - set(state["files"]):
            raise ValueError(f"the digests of all files, those of {', '.join(sorted(missing))} are missing")
    except ValueError as error:
        raise ValueError(f"state.json must hold {error}") from None
    if state["step"] != step_of(path):
        raise ValueError(f"its name must say its step, state.json says {state['step']}")
    for name in damaged_files(path, state["files"]):
        (path / name).stat()  # one that is missing has an error of its own
        raise ValueError(f"{name} must hold what was written, its sha256 differs")
    return state


@torch.no_grad()
def _restore(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Copies the contents of a checkpoint's files into the model, the optimizer and the random generators."""
    whole = all((path / name).exists() for name in WHOLE)
    stored = {} if is_sharded(model) or not whole else load_file(path / WHOLE[0]) | load_file(path / WHOLE[1])
    sizes = {name: tensor.shape for name, tensor in stored.items()} or sizes_in(path)
    steps = load_file(path / (WHOLE[1] if whole else STEPS))
    if zero.is_zero(model):
        steps = {name: step for name, step in steps.items() if name.endswith("/step")}
        tensors = zero.empty_state(model, steps)
    else:
        begun = {name: parameter for name, parameter in model.named_parameters() if f"{name}/step" in steps}
        begin_moments(optimizer, begun.values())
        for name, parameter in begun.items():
            set_step(optimizer, parameter, steps[f"{name}/step"])
        tensors = weights_of(model) | moments_of(model, optimizer)
    names = {name for name in sizes if not name.endswith("/step") and name not in ("torch", "cuda")}
    if other := sorted(n for n in {*names, *tensors} if sizes.get(n) != getattr(tensors.get(n), "shape", None)):
        raise DataError(
            f"checkpoint {path} must hold the weights of the target and their moments, {other[0]} differs ({len(other)} in all); use the "
            "versions that run.json names, or start over with --fresh"
        )
    if stored:
        for name, tensor in tensors.items():
            tensor.copy_(stored[name])
    else:
        load_shares(path, tensors)
    if zero.is_zero(model):
        zero.put_state(model, optimizer, tensors, steps)
    random = load_file(path / RANDOM)
    torch.set_rng_state(random["torch"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])


def _remove(path: Path) -> None:
    """Removes a checkpoint, or whatever else has its name."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
