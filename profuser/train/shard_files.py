"""Files with the shares that each process holds of tensors, by torch.distributed.checkpoint, as safetensors.

Every process writes its own file, whose header says which part of each tensor it holds. Any number of processes can read them, as
well as files of whole tensors: each reads what it needs for its own shares.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save
from torch import Size, Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from profuser.store.files import write_atomic, writing
from profuser.store.sealed import FileDigest, digest_of_file

STEPS = "steps.safetensors"
"""The file of AdamW's counts of steps: single numbers, which every process has, and which have no parts."""


def save_shares(
    directory: Path, tensors: dict[str, Tensor], steps: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> dict[str, FileDigest]:
    """Writes each process's shares into one file of its own. All processes must call it.

    Args:
        group: what they talk through, None for what they train with.
    Returns:
        The digests of the files of all processes.

    Raises:
        DiskFull: the disk of one of the processes has no room.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with writing(directory, size):
        try:
            writer = HuggingFaceStorageWriter(str(directory), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=group)
        except CheckpointException as error:  # it holds the error of each process that failed
            failure = next(iter(error.failures.values()))
            raise failure[0] if isinstance(failure, tuple) else failure from None
    if dist.get_rank() == 0:
        write_atomic(directory / STEPS, save(steps))
    own = sorted(directory.glob(f"shard-{dist.get_rank() + 1:05d}-*.safetensors"))
    digests = {path.name: digest_of_file(path) for path in own}
    if dist.get_rank() == 0:
        digests[STEPS] = digest_of_file(directory / STEPS)
    of_all: list[dict[str, FileDigest]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_all, digests, group)
    return {name: digest for each in of_all for name, digest in each.items()}


def sizes_in(directory: Path) -> dict[str, Size]:
    """Returns the shapes of all tensors in the safetensors files of a directory, whole ones and those in parts."""
    metadata = HuggingFaceStorageReader(str(directory)).read_metadata()
    stored = metadata.state_dict_metadata.items()
    return {name: Size(each.size) for name, each in stored if isinstance(each, TensorStorageMetadata)}


def load_shares(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Reads tensors in place, each process its own shares. If they are sharded, all processes must call it."""
    sharded = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads, and that is meant
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=not sharded)
