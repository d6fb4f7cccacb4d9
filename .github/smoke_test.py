"""Tests in seconds that an installed profuser works: its loss, and the import of its C++ extensions.

Run it where there is no checkout: python smoke_test.py. In a checkout the folder `profuser` would be tested instead.
"""

import importlib.metadata
import sys
from pathlib import Path

import torch

import profuser
from profuser import fused_linear_fusion_loss

place = Path(profuser.__file__).resolve().parent
assert "site-packages" in place.parts, f"profuser must be an installed one, got {place}"

torch.manual_seed(0)
rows, width, vocabulary, sources, kept = 6, 16, 50, 2, 3
hidden = torch.randn(rows, width, requires_grad=True)
head = torch.randn(vocabulary, width, requires_grad=True)
labels = torch.randint(vocabulary, (rows,))
logprobs, ids = torch.randn(sources, rows, vocabulary).log_softmax(-1).topk(kept)
ce = torch.tensor([[1.0], [2.0]])
fused_linear_fusion_loss(hidden, head, labels, ids, logprobs, source_ce=ce, beta=0.3).backward()
assert hidden.grad.isfinite().all()
assert head.grad.abs().sum() > 0

from profuser import _align, _rows  # noqa: E402 - this is the last test, because its failure says most if all others pass

print(
    f"profuser {importlib.metadata.version('profuser')} from {place}, extensions {_align.__file__}, {_rows.__file__}",
    file=sys.stderr,
)
