"""The colours of the report's pictures, for light and for dark pages.

They are Okabe and Ito's colours, moved until each has a contrast of at least 3 to its page and any two differ by at least 20 in
CIELAB. This also holds for readers with a colour-vision deficiency (simulated as in Machado et al. 2009); a test checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from matplotlib.colors import Colormap, LinearSegmentedColormap, to_rgb


@dataclass(frozen=True)
class Theme:
    """The colours of a picture. `page` is the background that it lies on; `heat` is a scale from nothing to everything."""

    page: str
    text: str
    soft: str
    line: str
    band: str
    fused: str
    sources: tuple[str, ...]  # blue, orange, green, purple, sky, grey
    heat: tuple[str, ...]

    @cached_property
    def heat_map(self) -> Colormap:
        """The colours of `heat` as a continuous scale."""
        return LinearSegmentedColormap.from_list("heat", self.heat)

    def ink(self, depth: float) -> str:
        """Returns black or white, whichever can be read better on the heat map's colour for `depth` in [0, 1]."""
        # Black and white have the same contrast to a colour with this luminance (WCAG).
        return "black" if luminance(self.heat_map(float(depth))) > 0.179 else "white"

    @property
    def style(self) -> dict[str, Any]:
        """The settings of Matplotlib for this theme."""
        paint = dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), self.text
        )
        return paint | {
            "font.size": 11, "axes.titlesize": 11.5, "axes.titleweight": "bold", "axes.spines.top": False,
            "axes.spines.right": False, "axes.axisbelow": True, "axes.grid": False, "grid.color": self.line,
            "axes.facecolor": "none", "figure.facecolor": self.page, "hatch.linewidth": 0.6,
            "legend.frameon": False, "legend.fontsize": 10,
            "text.parse_math": False,  # a "$" in a skill's name is a dollar sign
        }  # fmt: skip


LIGHT = Theme(
    page="#ffffff", text="#16191d", soft="#48505a", line="#dde1e5", band="#f3f5f7", fused="#b73d00",
    sources=("#1250cf", "#d67d00", "#00aa57", "#cc79a7", "#5e8cf8", "#656163"),
    heat=("#f1f5fb", "#a9c8ee", "#4d8fd9", "#1250a8", "#0a2c66"),
)  # fmt: skip
DARK = Theme(
    page="#1e2226", text="#eceff2", soft="#aab3bc", line="#3a4148", band="#262b30", fused="#e36937",
    sources=("#3a7dfd", "#f0ba29", "#15ca83", "#b669b6", "#abd1ff", "#7c7a7c"),
    heat=("#262c33", "#27476f", "#2f6db5", "#6aa9ea", "#cfe5fb"),
)  # fmt: skip


def luminance(color: Any) -> float:
    """Returns the relative luminance of a colour, in [0, 1] (WCAG 2)."""
    parts = (channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4 for channel in to_rgb(color))
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts))
