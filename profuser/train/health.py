"""Notices optimizer steps that stand out: a loss far above those before it, or a step that takes far longer."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

RECENT, ENOUGH = 50, 10
"""A step is compared with so many steps before it in its stage, once there are enough of them."""
SPIKE_DEVIATIONS, SPIKE_TIMES = 6.0, 1.5
"""A loss is a spike if it is above the median by so many deviations, and also that many times the median."""
SLOW_TIMES = 10.0
"""A step is slow if it takes so many times the median."""


@dataclass(slots=True)
class Health:
    """Watches the steps of one stage after the other.

    losses, seconds: of the most recent steps of the stage.
    """

    stage: int = -1
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def notices(self, stage: int, loss: float | None, seconds: float) -> list[str]:
        """Takes a step into account, and returns what stands out in it, in words.

        Args:
            loss: None for a step that had nothing to learn.
        """
        if stage != self.stage:  # another stage has another loss
            self.stage = stage
            self.losses.clear()
            self.seconds.clear()
        found = []
        if loss is not None and (said := spike(self.losses, loss)):
            found.append(said)
        if len(self.seconds) >= ENOUGH and seconds > SLOW_TIMES * (usual := statistics.median(self.seconds)):
            found.append(f"it took {seconds:.1f} s, {seconds / usual:.0f} times the median of {usual:.2g} s")
        if loss is not None:
            self.losses.append(loss)
        self.seconds.append(seconds)
        return found


def spike(before: Sequence[float], loss: float) -> str:
    """Says of a loss that it is far above those before it, in words; "" if it is not, or if these are too few."""
    if len(before) < ENOUGH:
        return ""
    usual = statistics.median(before)
    # The median of the distances estimates the standard deviation, and single outliers do not change it.
    deviation = 1.4826 * statistics.median(abs(x - usual) for x in before)
    if loss <= max(usual + SPIKE_DEVIATIONS * deviation, SPIKE_TIMES * usual):
        return ""
    return f"the loss was {loss:.3f}, the median of the {len(before)} steps before {usual:.3f}"
