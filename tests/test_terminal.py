"""What the end of a run says of its scores."""

import pytest

from profuser.evaluate.terminal import worse_line


@pytest.mark.parametrize(("fused", "said"), [(0.25, True), (0.5, False), (0.75, False)])
def test_a_run_that_made_the_target_worse_says_so(fused, said):
    scores = {"sources": {}, "target_before": {"a": 0.5, "mean": 0.5}, "fused": {"a": fused, "mean": fused}}
    line = worse_line(scores)
    assert bool(line) == said
    assert ("worse than the target was (25.0 after 50.0)" in line) == said
