"""What the tests of adapters share."""

import pytest

from profuser.pipeline import train
from profuser.train.loop import Trainer


def check_resumed(run, finished, monkeypatch) -> None:
    """Interrupts a run of four steps in its third, goes on, and compares it with `finished`, the uninterrupted run and its scores."""
    step, taken = Trainer._step, []

    def interrupted(self, number, *rest):
        taken.append(number)
        if len(taken) == 3:
            raise KeyboardInterrupt
        return step(self, number, *rest)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    assert train(run) == finished[1]
    assert taken == [0, 1, 2, 2, 3]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (run.output_dir / name).read_bytes() == (finished[0].output_dir / name).read_bytes(), name
