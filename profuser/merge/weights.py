"""The weights of a model on disk: mapped into memory tensor by tensor, and written piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from profuser.errors import DataError
from profuser.models.weights import check_index, opened
from profuser.typed import read_json

MAX_SHARD_BYTES = 5_000_000_000
NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
         torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
"""The dtypes as the headers of safetensors files name them."""


class StoredWeights:
    """The tensors in the safetensors files of a model's directory.

    Args:
        name: the model's name, for error messages.
        aliases: the stored name of parameters that share the tensor of another one.
    Attributes:
        names: the tensors' names, in the order of the files.

    Raises:
        DataError: the directory has no safetensors file, or a damaged one.
    """

    def __init__(self, name: str, folder: Path, aliases: Mapping[str, str]):
        self._name = name
        self._files: dict[str, Path] = {}
        for index in folder.glob("*.safetensors.index.json"):
            check_index(name, folder, index)
        paths = files_of(folder)
        if not paths:
            raise DataError(
                f"{name}: a model that is merged must have safetensors files, {folder} has none; load it with transformers and "
                "save it again with save_pretrained"
            )
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in paths:
            with opened(name, path, "pt") as file:
                for stored in file.keys():  # noqa: SIM118
                    self._files[stored] = path
                    self._shapes[stored] = tuple(file.get_slice(stored).get_shape())
        self._last: tuple[Path, Any] | None = (
            None  # the file that was read last, because the next tensor is mostly in it
        )
        # Of parameters that share one tensor only one is stored, or the file holds it twice.
        self._aliases = {alias: stored for alias, stored in aliases.items() if alias not in self._files}
        self.names = list(self._files)

    def __contains__(self, tensor: str) -> bool:
        return self._aliases.get(tensor, tensor) in self._files

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self._shapes[self._aliases.get(tensor, tensor)]

    def get(self, tensor: str) -> Tensor:
        """Returns a tensor that is mapped from its file: the system reads what is looked at, and may forget it at any time."""
        stored = self._aliases.get(tensor, tensor)
        path = self._files[stored]
        if self._last is None or self._last[0] != path:
            self._last = path, opened(self._name, path, "pt")
        return self._last[1].get_tensor(stored)


def files_of(folder: Path) -> list[Path]:
    """Returns the safetensors files that transformers would load: one, those that an index lists, or whatever there is."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        return sorted({folder / part for part in read_json(index)["weight_map"].values()})
    return sorted(folder.glob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor that will be written: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class WeightsWriter:
    """Writes tensors to safetensors files one after the other, in an order that is known before.

    safetensors itself writes files whose tensors are all in memory. As shapes and dtypes are known, the header can be written
    first, and then every tensor as it comes, whole or in pieces.
    """

    def __init__(self, folder: Path, slots: Iterable[Slot], max_bytes: int = MAX_SHARD_BYTES):
        self._folder = folder
        shards: list[list[Slot]] = [[]]
        size = 0
        for slot in slots:
            if shards[-1] and size + slot.size > max_bytes:
                shards.append([])
                size = 0
            shards[-1].append(slot)
            size += slot.size
        count = len(shards)
        names = [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
        self._shards = list(zip(names if count > 1 else ["model.safetensors"], shards))

    def write(self, pieces: Iterable[Tensor]) -> None:
        """Writes the tensors of all slots, in their order, and the index of several files. A piece is some elements of one tensor."""
        given = iter(pieces)
        for name, slots in self._shards:
            with open(self._folder / name, "wb") as file:
                file.write(_header(slots))
                for slot in slots:
                    left = slot.size
                    while left:
                        piece = next(given)
                        left -= piece.nbytes
                        assert piece.dtype == slot.dtype, slot.name
                        assert left >= 0, slot.name
                        file.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(slot.size for _, slots in self._shards for slot in slots)},
                "weight_map": {slot.name: name for name, slots in self._shards for slot in slots},
            }
            (self._folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _header(slots: Iterable[Slot]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for slot in slots:
        begin, end = end, end + slot.size
        header[slot.name] = {
            "dtype": NAMES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
