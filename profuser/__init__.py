"""profuser: fuse several language models into one (ProFuser, arXiv 2408.04998)."""

from profuser.alignment.text import align, prefix_ranges
from profuser.fusion_model import FusionModel
from profuser.kernels.common import IGNORE_INDEX
from profuser.loss import FusedLinearFusionLoss, fused_linear_fusion_loss

__all__ = ["IGNORE_INDEX", "FusedLinearFusionLoss", "FusionModel", "align", "fused_linear_fusion_loss", "prefix_ranges"]
