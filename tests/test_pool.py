"""A command that works on several runs side by side ends when it is told to."""

import signal
import subprocess
import sys
import time

from conftest import ROOT

WAITS = """
import sys, time
from pathlib import Path
from profuser.experiments.pool import stoppable_pool

def run(folder, n):
    Path(folder, str(n)).touch()
    time.sleep(60)

if __name__ == "__main__":
    with stoppable_pool(1, max_tasks_per_child=1) as pool:
        for job in [pool.submit(run, sys.argv[1], n) for n in range(3)]:
            job.result()
"""


def test_a_signal_ends_the_runs_at_work_and_begins_no_other(tmp_path):
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    command = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not (tmp_path / "0").exists() and time.monotonic() < end:
        time.sleep(0.05)
    command.send_signal(signal.SIGTERM)
    assert command.wait(timeout=30) != 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py") == ["0"]
