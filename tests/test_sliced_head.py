"""A head that is divided among processes gives the loss of the whole one: value, statistics and gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from loss_checks import make_case

from profuser.loss import fused_linear_fusion_loss

FORKED = Path(__file__).parent / "forked.py"


@pytest.mark.parametrize(
    ("processes", "options", "members"),
    [
        (2, [], "12"),
        pytest.param(2, ["--all"], "34", marks=pytest.mark.long),
        pytest.param(4, ["--all"], "34", marks=pytest.mark.long),
    ],
)
def test_every_member_of_a_sliced_head_is_that_of_the_whole_one(processes, options, members):
    command = [sys.executable, str(FORKED), str(processes), "sliced_heads", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [members]


def test_a_group_is_a_group():
    with pytest.raises(TypeError, match=r"process_group must be a torch\.distributed\.ProcessGroup, got 'x'"):
        fused_linear_fusion_loss(**make_case(process_group="x"))


def test_rows_that_are_labelled_must_fit_the_bound():
    case = make_case()
    labelled = int((case["labels"] != -100).sum())
    for bound in (labelled, labelled + 3, len(case["labels"]), 1000):
        assert torch.equal(fused_linear_fusion_loss(**case, valid_rows=bound), fused_linear_fusion_loss(**case))
    with pytest.raises(
        ValueError, match=f"valid_rows must be at least the {labelled} rows with a label, got {labelled - 1}"
    ):
        fused_linear_fusion_loss(**case, valid_rows=labelled - 1)
    with pytest.raises(ValueError, match="valid_rows must be >= 0"):
        fused_linear_fusion_loss(**case, valid_rows=-1)
    with pytest.raises(TypeError, match="valid_rows must be a whole number"):
        fused_linear_fusion_loss(**case | {"valid_rows": torch.tensor(3)})
