"""profuser: fuse several language models into one (ProFuser, arXiv 2408.04998).

The public names are imported when they are first used, so that the loss alone needs torch and nothing else of ours.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profuser.alignment.align import align, prefix_ranges
    from profuser.fusion_model import FusionModel
    from profuser.kernels.common import IGNORE_INDEX
    from profuser.kernels.source_topk import source_topk
    from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss

__version__ = "0.1.0"

# Read when torch loads OpenMP. Its threads spin at every barrier for longer than a step of a small model takes, and where
# another process needs a core they spin away its time: training was 30 times slower there, and is not slower elsewhere.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_MODULES = {
    "IGNORE_INDEX": "profuser.kernels.common",
    "FusedLinearFusionLoss": "profuser.loss",
    "FusionModel": "profuser.fusion_model",
    "align": "profuser.alignment.align",
    "fused_linear_fusion_loss": "profuser.loss",
    "prefix_ranges": "profuser.alignment.align",
    "source_topk": "profuser.kernels.source_topk",
}

__all__ = [
    "IGNORE_INDEX",
    "FusedLinearFusionLoss",
    "FusionModel",
    "align",
    "fused_linear_fusion_loss",
    "prefix_ranges",
    "source_topk",
]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'profuser' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
