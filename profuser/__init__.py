"""profuser fuses several language models into one (ProFuser, arXiv 2408.04998).

The public names are imported when they are first used, so that someone who uses only the loss needs only torch.
"""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from profuser.alignment.align import align, follow_numbers, prefix_ranges
    from profuser.fusion_model import FusionModel
    from profuser.kernels.common import IGNORE_INDEX
    from profuser.kernels.source_topk import source_topk
    from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss

__version__ = "0.1.0"

# This is read when torch loads OpenMP. By default OpenMP's threads spin at every barrier for longer than a step of a small model
# takes. If another process needs the core, they take its time: training was then 30 times slower. With a short spin it is
# not, and nowhere else is it slower than before.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_MODULES = {
    "IGNORE_INDEX": "profuser.kernels.common",
    "FusedLinearFusionLoss": "profuser.loss",
    "FusionModel": "profuser.fusion_model",
    "align": "profuser.alignment.align",
    "follow_numbers": "profuser.alignment.align",
    "fused_linear_fusion_loss": "profuser.loss",
    "prefix_ranges": "profuser.alignment.align",
    "source_topk": "profuser.kernels.source_topk",
}

__all__ = [
    "IGNORE_INDEX",
    "FusedLinearFusionLoss",
    "FusionModel",
    "align",
    "follow_numbers",
    "fused_linear_fusion_loss",
    "prefix_ranges",
    "source_topk",
]


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used, and keeps it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'profuser' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
