"""Runs the demo's recipe over any number of prompts, killed on the way, and sets beside it what the plan said beforehand.

    python -m benchmarks.scale DIR 5000 20000 [--kills 2]

For each number it writes so many prompts of the demo's three skills, times a handful with `profuser train --dry-run --probe`, and then
prepares, trains and evaluates. That is killed with SIGKILL at random moments and begun again until it ends. It prints as JSON what was
estimated and what was measured: the seconds of all processes together, and the most memory of its own that one of them had.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measure import surroundings
from profuser.demo.skills import World, row_of

SKILLS = ("reasoning", "knowledge", "safety")
UNITS = {"s": 1, "min": 60, "h": 3600}


def write_prompts(path: Path, count: int) -> None:
    """Writes so many different prompts with their ground truths, mostly sums, of which there are the most."""
    world, rng, rows = World(), random.Random(0), {}
    of_skill = [world.pretraining(skill, "scale", strong=True) for skill in SKILLS]
    while len(rows) < count:
        problem = rng.choice(of_skill)(rng)
        rows[problem.prompt] = row_of(problem)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()), encoding="utf-8")


def estimated(arguments: list[str]) -> dict[str, float]:
    """Returns the seconds of each phase by a timed handful, and the MiB of the process, as the plan prints them."""
    command = [sys.executable, "-m", "profuser.train", "--dry-run", "--probe", "--processes", "1", *arguments]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^  (prepare|train|evaluate) +([\d.]+) (\w+)$", text, re.MULTILINE)
    (memory,) = re.findall(r"all else: ([\d.]+) MiB", text)
    return {phase: float(value) * UNITS[unit] for phase, value, unit in found} | {"mib": float(memory)}


def run(arguments: list[str], log: Path, after: float | None) -> tuple[bool, float, float]:
    """Runs it, and kills it after so many seconds. Returns whether it ended by itself, its seconds, and the most MiB that it had."""
    begin = time.monotonic()
    command = [sys.executable, "-m", "profuser.train", *arguments]
    with log.open("ab") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, start_new_session=True)
    mib, ended = 0.0, False
    while not ended and (after is None or time.monotonic() - begin < after):
        time.sleep(0.2)
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        except OSError:
            status = ""
        if found := re.search(r"RssAnon:\s+(\d+) kB", status):
            mib = max(mib, int(found[1]) / 1024)
        ended = process.poll() is not None
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    if ended and process.wait():
        raise SystemExit(f"the run ended with {process.returncode}; see {log}")
    process.wait()
    return ended, time.monotonic() - begin, mib


def measure(directory: Path, count: int, kills: int) -> dict[str, object]:
    """Prepares, trains and evaluates over so many prompts, and returns what was estimated and measured."""
    directory.mkdir(parents=True)
    write_prompts(directory / "prompts.jsonl", count)
    arguments = [
        f"--data.train={directory / 'prompts.jsonl'}",
        f"--store={directory / 'store'}",
        f"--output={directory / 'run'}",
    ]
    plan = estimated(arguments)
    whole = plan["prepare"] + plan["train"] + plan["evaluate"]
    rng = random.Random(count)
    seconds, peaks, ended = [], [], False
    while not ended:
        after = rng.uniform(0.2, 0.5) * whole if len(seconds) < kills else None
        ended, took, mib = run(arguments, directory / "log.txt", after)
        seconds.append(took)
        peaks.append(mib)
        print(
            f"{count} prompts: {'done' if ended else 'killed'} after {took:.0f} s, {mib:.0f} MiB",
            file=sys.stderr,
            flush=True,
        )
    return {
        "prompts": count,
        "estimated": plan | {"seconds": whole},
        "measured": {"seconds": sum(seconds), "mib": max(peaks), "each": [round(s, 1) for s in seconds]},
        "measured_by_estimated": sum(seconds) / whole,
        "load": round(os.getloadavg()[1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, help="a new folder, in which stores and runs are written")
    parser.add_argument(
        "prompts", type=int, nargs="+", help="how many prompts; several numbers are measured one after the other"
    )
    parser.add_argument("--kills", type=int, default=2, help="how often each run is killed")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = [measure(args.directory / str(count), count, args.kills) for count in args.prompts]
    facts = {key: value for key, value in surroundings().items() if key != "command"}
    print(
        json.dumps(
            {"command": "python -m benchmarks.scale " + " ".join(sys.argv[1:]), **facts, "runs": found}, indent=1
        )
    )


if __name__ == "__main__":
    main()
