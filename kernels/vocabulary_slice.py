"""A head whose rows are divided among processes: which columns of the logits this process has, and how results are joined.

Every process of the group has the same hidden states, labels and sources, and its own slice of the head, in the order of the
ranks. Ids are those of the whole vocabulary. What the loss needs of all columns is a maximum, a few sums, and the logits at the
ids that are lifted: two small reductions for each chunk of rows.
Dimension letters: C rows of a chunk, L lifted ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # torch may have been built without it, and most users have no group
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True)
class VocabularySlice:
    """The columns that this process has: all of them where there is no group."""

    begin: int
    size: int
    whole: int
    """The size of the whole vocabulary."""
    group: ProcessGroup | None = None

    @property
    def share(self) -> int:
        """The largest slice that any process can have if they are even; alike on all of them."""
        return self.whole if self.group is None else -(-self.whole // self.group.size())

    def columns_of(self, ids: Tensor) -> Tensor:
        """This process's columns of ids (C, L); `size`, one more than there are, stands for an id that another process has."""
        if self.group is None:
            return ids
        columns = ids - self.begin
        return torch.where((columns >= 0) & (columns < self.size), columns, self.size)

    def maximum(self, x: Tensor) -> Tensor:
        """The largest of all processes' x, elementwise."""
        return self._reduced(x, "MAX")

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes' x."""
        return self._reduced(x, "SUM")

    def _reduced(self, x: Tensor, op: str) -> Tensor:
        if self.group is None:
            return x
        import torch.distributed as dist

        x = x.contiguous()
        dist.all_reduce(x, getattr(dist.ReduceOp, op), group=self.group)
        return x


def local_slice(
    weight: Tensor, bias: Tensor | None, process_group: ProcessGroup | None
) -> tuple[Tensor, Tensor | None, ProcessGroup | None]:
    """This process's rows of a head that is a DTensor sharded on V, with its group; what is no DTensor stays as it is.

    Raises:
        ValueError: a DTensor has another placement, or weight and bias are not divided alike.
    """
    if process_group is not None:
        from torch.distributed import ProcessGroup

        if not isinstance(process_group, ProcessGroup):
            raise TypeError(
                f"process_group must be a torch.distributed.ProcessGroup, got {process_group!r}; dist.new_group() gives one"
            )
        if weight.numel() == 0:
            raise ValueError(
                f"weight must be (V, D) with V, D > 0 on every process, got {tuple(weight.shape)}; give each at least one row"
            )
    sharded = [name for name, x in (("weight", weight), ("bias", bias)) if hasattr(x, "full_tensor")]
    if not sharded:
        return weight, bias, process_group
    if sharded == ["bias"] or (bias is not None and sharded == ["weight"]):
        raise ValueError(
            f"weight and bias must be divided alike, got a DTensor for {sharded[0]} alone; shard both on V"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is None:
            continue
        mesh, placements = x.device_mesh, x.placements  # pyrefly: ignore[missing-attribute]
        if mesh.ndim != 1 or not placements[0].is_shard(0):
            raise ValueError(
                f"{name} must be a plain tensor or a DTensor sharded on V (its first axis) over one mesh axis, got placements "
                f"{tuple(placements)}; shard only the module whose forward calls the loss (FusionModel's), or pass "
                f"{name}.full_tensor(grad_placements=[Partial('avg')])"
            )
    of_mesh = weight.device_mesh.get_group()  # pyrefly: ignore[missing-attribute]
    rows, processes = weight.shape[0], of_mesh.size()
    if math.ceil(rows / processes) * (processes - 1) >= rows:  # by how a DTensor is divided
        raise ValueError(
            f"weight must give every process a row, {rows} rows over {processes} processes leave the last without; shard it over fewer"
        )
    if process_group is not None and process_group is not of_mesh:
        raise ValueError("process_group must be the group of weight's own mesh, got another; leave it out")
    local: Any = [None if x is None else x.to_local() for x in (weight, bias)]  # pyrefly: ignore[missing-attribute]
    return local[0], local[1], of_mesh


def slice_of(weight: Tensor, group_name: str | None) -> VocabularySlice:
    """The columns that this process's `weight` (V, D) gives. The processes tell each other how many they have."""
    size = weight.shape[0]
    if group_name is None:
        return VocabularySlice(0, size, size)
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _resolve_process_group

    group = _resolve_process_group(group_name)  # pyrefly: ignore[bad-argument-type]  # a name of type str
    sizes = torch.zeros(group.size(), dtype=torch.int64, device=weight.device)
    sizes[group.rank()] = size
    dist.all_reduce(sizes, group=group)
    return VocabularySlice(int(sizes[: group.rank()].sum()), size, int(sizes.sum()), group)


def check_same_rows(labels: Tensor, vocabulary: VocabularySlice) -> None:
    """Raises ValueError unless all processes have the same labels (N,): a head that FSDP has sharded looks like a sliced one."""
    if vocabulary.group is None:
        return
    place = torch.arange(1, labels.shape[0] + 1, device=labels.device)
    print_of = torch.stack([place.sum(), (labels * place).sum(), (labels * place * place).sum()])
    largest = vocabulary.maximum(torch.cat([print_of, -print_of]))
    if not torch.equal(largest[:3], -largest[3:]):
        raise ValueError(
            "all processes of a sliced head must have the same rows, got other labels on other processes; in data parallelism gather "
            "the head: shard only the module whose forward calls the loss (FusionModel's)"
        )
