"""Run by test_sliced_head.py in several processes: the loss with a head that is divided among them, beside the whole one.

    python tests/forked.py 2 sliced_heads [--all]

It compares every third member of the family, or all, and prints how many those were. With --all, each has softcap, temperature and the
rest, otherwise those with mixed sources have. Each process fails where its loss, statistics or gradients differ.
"""

import itertools
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from loss_checks import make_case
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing import assert_close

from profuser.kernels.divergences import DIVERGENCES, infinite_at_zero
from profuser.kernels.tails import TAILS
from profuser.loss import fused_linear_fusion_loss

FULL = {"temperature": 1.5, "softcap": 4.0, "logit_scale": 0.7, "label_smoothing": 0.1, "z_loss": 1e-3}


def members(everything):
    for divergence, tail, mixed in itertools.product(DIVERGENCES, TAILS, (False, True)):
        if not (tail == "renormalize" and infinite_at_zero(divergence)):
            yield {"divergence": divergence, "tail": tail}, mixed, FULL if everything or mixed else {}


def results(case: Any, options: Any, slice_of_head: slice, **more: Any) -> Any:
    """The loss, its statistics and its gradients; those of weight and bias of the rows in `slice_of_head`."""
    case = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    leaves = [case["hidden"].requires_grad_()]
    for name in ("weight", "bias"):
        case[name] = case[name][slice_of_head].clone().requires_grad_()
        leaves.append(case[name])
    arguments: Any = case | options | more | {"chunk_size": 5}
    loss, stats = fused_linear_fusion_loss(**arguments, return_stats=True, entropies=True)
    grad_output = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return loss.detach(), stats, torch.autograd.grad(loss, leaves, grad_output)


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    torch.manual_seed(0)
    case = make_case(dtype=torch.float64, N=23, spread=2.0)
    mixed_case = {name: value for name, value in case.items() if name != "source_ce"}
    mixed_case["source_weight"] = torch.rand(3, 23, dtype=torch.float64)
    V = case["weight"].shape[0]
    bounds = torch.linspace(0, V, world + 1).long().tolist()
    bounds[1] = 7  # uneven slices, of which some rows' ids are in none but one
    mine = slice(bounds[rank], bounds[rank + 1])

    assert world > 1
    compared = 0
    everything = "--all" in sys.argv
    for options, mixed, full in itertools.islice(members(everything), 0, None, 1 if everything else 3):
        one = mixed_case if mixed else case
        for reduction in ("sum", "none"):
            arguments = options | full | {"reduction": reduction}
            loss, stats, (hidden, weight, bias) = results(one, arguments, slice(None))
            ours = results(one, arguments, mine, process_group=group)
            tolerance = {"rtol": 1e-9, "atol": 1e-12}
            assert_close(ours[0], loss, **tolerance)
            assert_close(ours[1], stats, **tolerance)
            assert_close(ours[2], (hidden, weight[mine], bias[mine]), **tolerance)
            part = results(one, arguments, mine, process_group=group, partial_hidden_grad=True)[2][0]
            dist.all_reduce(part)
            assert_close(part, hidden, **tolerance)
        compared += 1

    # Without a source, and a head as a DTensor.
    plain = {name: case[name] for name in ("hidden", "weight", "labels", "bias")}
    whole = results(plain, FULL, slice(None))
    assert_close(results(plain, FULL, mine, process_group=group)[0], whole[0])
    mesh = init_device_mesh("cpu", (world,))
    leaves: dict[str, Any] = {}
    for name in ("weight", "bias"):
        local = case[name].chunk(world)[rank].clone()
        leaves[name] = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=case[name].shape, stride=case[name].stride()
        )
        leaves[name].requires_grad_()
    sharded: Any = case | leaves
    loss = fused_linear_fusion_loss(**sharded)
    loss.backward(torch.tensor(0.5, dtype=loss.dtype))
    expected = results(case, {}, slice(None))
    assert_close(loss.detach(), expected[0])
    assert_close(leaves["weight"].grad.full_tensor(), expected[2][1])

    # What is refused.
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            fused_linear_fusion_loss(**case | changes)

    sliced = {"process_group": group, "weight": case["weight"][mine], "bias": case["bias"][mine]}
    refused("must have the same rows", labels=case["labels"].roll(rank), **sliced)
    refused(r"labels must be in \[0, 83\)", labels=torch.full_like(case["labels"], V), **sliced)
    refused("sharded on V", **{name: DTensor.from_local(case[name], mesh, [Replicate()]) for name in leaves})
    refused("divided alike", weight=leaves["weight"])
    one_row = {
        name: DTensor.from_local(
            x[: int(rank == 0)],
            mesh,
            [Shard(0)],
            run_check=False,
            shape=torch.Size([1, *x.shape[1:]]),
            stride=x.stride(),
        )
        for name, x in case.items()
        if name in leaves
    }
    refused(f"1 rows over {world} processes", **one_row)
    for name in ("labels", "source_ids", "ce_weight"):
        whole_rows = DTensor.from_local(case[name], mesh, [Replicate()])
        refused(rf"{name} must be a plain tensor, got a DTensor; pass {name}\.full_tensor\(\)", **{name: whole_rows})
    if rank == 0:
        print(compared)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
