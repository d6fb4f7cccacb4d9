"""Why a vote gives no signal on a prompt, as a store's summary names the reasons, and what helps."""

from __future__ import annotations

from collections.abc import Mapping

UNFINISHED, BELOW = "no response was finished", "every response is below a judge's floor"
SAME, ALIKE = "all responses are the same text", "the judges scored all alike or abstained"

FIXES = {
    UNFINISHED: "raise generation.max_new_tokens, or data.max_length if the prompts leave too little of it",
    BELOW: "lower the floor of that judge",
    SAME: "use sources that differ more, or let each give several responses with a generation.temperature above 0",
    ALIKE: "use judges that tell responses apart",
}


def advice(reasons: Mapping[str, int], rule: str) -> str:
    """Returns what helps against the most frequent reason.

    Args:
        reasons: how many prompts had no signal for each. rule: judging.no_signal, whose other value is named where it is "skip".
    """
    most = max(reasons, key=lambda reason: reasons[reason], default=ALIKE)
    return FIXES.get(most, FIXES[ALIKE]) + (", or set judging.no_signal: ground_truth" if rule == "skip" else "")
