"""A head whose rows are divided among processes: which columns of the logits this process has, and how results are joined.

Every process of the group has the same hidden states, labels and sources, and its own slice of the head, in the order of the
ranks. Ids are those of the whole vocabulary. What the loss needs of all columns is a maximum, a few sums, and the logits at the
ids that are lifted: two small reductions for each chunk of rows.
Dimension letters: C rows of a chunk, L lifted ids.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group


@dataclass(frozen=True, slots=True)
class VocabularySlice:
    """The columns that this process has: all of them where there is no group."""

    begin: int
    size: int
    whole: int
    """The size of the whole vocabulary."""
    group: dist.ProcessGroup | None = None

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
        return self._reduced(x, dist.ReduceOp.MAX)

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes' x."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def _reduced(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        if self.group is None:
            return x
        x = x.contiguous()
        dist.all_reduce(x, op, group=self.group)
        return x


def slice_of(weight: Tensor, group_name: str | None) -> VocabularySlice:
    """The columns that this process's `weight` (V, D) gives. The processes tell each other how many they have."""
    size = weight.shape[0]
    if group_name is None:
        return VocabularySlice(0, size, size)
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
