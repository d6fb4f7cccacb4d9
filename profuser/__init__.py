"""profuser: fuse several language models into one (ProFuser, arXiv 2408.04998)."""

import os

# Read when torch loads OpenMP. Its threads spin at every barrier for longer than a step of a small model takes, and where
# another process needs a core they spin away its time: training was 30 times slower there, and is not slower elsewhere.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from profuser.alignment.text import align, prefix_ranges
from profuser.fusion_model import FusionModel
from profuser.kernels.common import IGNORE_INDEX
from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss

__all__ = [
    "IGNORE_INDEX",
    "FusedLinearFusionLoss",
    "FusionModel",
    "align",
    "fused_linear_fusion_loss",
    "prefix_ranges",
]
