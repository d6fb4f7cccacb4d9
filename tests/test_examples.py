"""The examples in the docstrings of the public functions run and give the results that they show."""

import doctest
import inspect

import pytest
import torch

from profuser import FusionModel, align, fused_linear_fusion_loss, source_topk


@pytest.mark.parametrize(
    "documented", [fused_linear_fusion_loss, source_topk, FusionModel, align], ids=lambda x: x.__name__
)
def test_the_example_in_the_docstring_runs(documented):
    torch.manual_seed(0)
    text = inspect.cleandoc(documented.__doc__)  # Python 3.13 takes the indentation out by itself
    assert "\nExample:\n" in text
    example = doctest.DocTestParser().get_doctest(text, {}, documented.__name__, None, 0)
    report: list[str] = []
    result = doctest.DocTestRunner().run(example, out=report.append)
    assert result.attempted > 3
    assert not result.failed, "".join(report)
