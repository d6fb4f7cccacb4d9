"""Several processes make one store together, and it does not depend on how many they were nor on which of them were lost.

`python -m pytest tests/test_workers.py -m long` kills them at twenty seeded moments, and starts them by torchrun.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import yaml
from conftest import ROOT, small_run
from test_lease import another_process, held, leases

from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import Preparation
from profuser.prepare.responses import Response
from profuser.prepare.sharing import Sharing, in_turn
from profuser.store import layout
from profuser.store.division import Part
from profuser.store.lease import FOLDER
from profuser.store.store import Store
from profuser.text.fit import Verdict

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

KILLS = 10
"""How often each of the two kinds of preparation is killed."""


def never(_: str) -> bool:
    return False


def content(store: Path) -> dict[str, object]:
    """All files of a store, but for how long its phases took."""
    files: dict[str, object] = {
        str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()
    }
    for name in ("manifest.json", "summary.json"):
        record = json.loads((store / name).read_text())
        for untimed in ("seconds", "sha256"):
            record.pop(untimed, None)
        record.get("files", {}).pop("summary.json", None)
        files[name] = json.dumps(record)
    return files


def test_no_two_claim_the_same_and_what_is_done_is_not_claimed(tmp_path):
    with held(tmp_path, use="works") as first:
        assert first.use == "alone"
        first.share("works")
        with held(tmp_path, use="works") as second:
            assert second.use == "works"
            assert first.claim(["a", "b", "c"], never) == "a"
            assert second.claim(["a", "b", "c"], never) == "b"
            assert first.claim(["a", "b", "c"], lambda name: name == "a") == "c"
            assert second.claim(["a", "b", "c"], lambda name: name != "c") is None
        assert first.claim(["b"], never) == "b"


def test_who_works_waits_for_nobody_who_works_and_says_who_it_is(tmp_path, capsys):
    with held(tmp_path, use="works") as first:
        first.share("works")
        with held(tmp_path, use="works"), held(tmp_path, use="reads"):
            assert len(leases(tmp_path)) == 3
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"is being made by process {os.getpid()} on" in out
    assert "sharing the work" in out


WORKER = """\
import sys, time
from pathlib import Path
from profuser.recipe.compare import differing_keys
from profuser.store.lease import hold
with hold(Path(sys.argv[1]), "store", {"mode": "bytes"}, differing_keys, use="works") as lease:
    lease.share("works")
    lease.claim(["a"], lambda _: False)
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_claim_of_a_killed_process_is_free_again(tmp_path):
    with another_process(tmp_path, program=WORKER) as process, held(tmp_path, use="works") as mine:
        assert mine.use == "works"
        assert mine.claim(["a"], never) is None
        process.kill()
        process.wait()
        assert mine.claim(["a"], never) == "a"
    assert list(tmp_path.iterdir()) == []


def test_each_process_of_a_launcher_begins_with_another_model(monkeypatch):
    orders = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        orders.append(in_turn("abc"))
    assert orders == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]
    assert in_turn([]) == []
    monkeypatch.delenv("RANK")
    assert in_turn("abc") == ["a", "b", "c"]


def test_the_last_line_of_progress_says_what_other_processes_are_still_at(tmp_path, capsys):
    parts = [Part(number, [2 * number, 2 * number + 1], "") for number in range(3)]
    made: set[int] = set()
    kind = layout.truth("train", "guardian")
    origins: Any = mock.Mock(**{"inputs.parts": lambda split: parts, "is_made": lambda kind, part: part.number in made})
    with held(tmp_path, use="works") as mine:
        mine.share("works")
        with held(tmp_path, use="works") as other:
            assert other.claim([kind.shard(2)], never) is not None
            for _, part, _, bar in Sharing(origins, mine).claimed("score", "examples", [kind], lambda: None):
                bar.update(len(part))
                made.add(part.number)
    assert capsys.readouterr().out.splitlines()[-1] == "score: 4/6 examples in 0 s, other processes are at the last 2"


def test_two_workers_make_what_one_would(prepared, tmp_path):
    """The two are threads, which leases and claims do not tell from processes. Models cannot be loaded so: theirs is there."""
    run = small_run(tmp_path)
    shutil.copytree(prepared[2].directory, run.store_dir)
    for path in [*run.store_dir.glob("targets/*"), run.store_dir / "samples.parquet"]:
        path.unlink()
    made: dict[str, set[int]] = {}
    put, inputs = Store.put, Inputs.open(run)

    def noting(store: Store, kind: layout.Kind, number: int, *arguments, **others) -> None:
        made.setdefault(kind.shard(number), set()).add(threading.get_ident())
        time.sleep(0.02)
        put(store, kind, number, *arguments, **others)

    with (
        mock.patch.object(Store, "put", noting),
        mock.patch("profuser.prepare.phases.gc.collect"),
        contextlib.ExitStack() as held,
        ThreadPoolExecutor(2) as threads,
    ):
        workers = [Preparation.begin(inputs, held) for _ in range(2)]
        for store in threads.map(Preparation.run, workers):
            assert store.complete
    assert content(run.store_dir) == content(prepared[2].directory)
    assert all(len(by) == 1 for by in made.values())
    assert len(set.union(*made.values())) == 2


def test_a_process_that_stood_still_keeps_the_shards_that_another_has_made_for_it(tmp_path):
    """What the others have made of them since, such as scores of responses, is made of theirs."""
    inputs = Inputs.open(small_run(tmp_path))
    with contextlib.ExitStack() as held:
        first, second = (Preparation.begin(inputs, held) for _ in range(2))
        part, *_ = inputs.parts("train")
        responses, scores = layout.responses("train", "guardian"), layout.scores("verifier")
        for preparation, text in ((first, "one"), (second, "two")):
            preparation._put_responses(responses, part, [[Response(text, True, Verdict.OK)]] * len(part))
        assert {row[0][0] for row in first.store.get_json(responses, part.number)} == {"one"}
        for name in ("scholar", "reckoner"):
            first._put_responses(
                layout.responses("train", name), part, [[Response("three", True, Verdict.OK)]] * len(part)
            )
        for preparation, score in ((first, 1.0), (second, 2.0)):
            preparation._put(scores, part, {"score": np.full((len(part), 3), score)})
        assert set(first.store.get(scores, part.number)["score"].flat) == {1.0}


PREPARE = ["-m", "profuser.prepare", "--config", "recipe.yaml"]
TOGETHER = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *PREPARE]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A folder with a recipe whose store has many shards, and in `whole` the store that one worker makes of it."""
    place = tmp_path_factory.mktemp("workers")
    small = small_run(place, "--capture.shard_size=2", "--date=2026-01-31").recipe  # it may be midnight meanwhile
    (place / "recipe.yaml").write_text(yaml.safe_dump(small.to_dict() | {"store": "whole"}))
    assert subprocess.run([sys.executable, *PREPARE], cwd=place, env=ENVIRONMENT, check=False).returncode == 0
    return place


def shards(store: Path) -> int:
    return sum(1 for folder in layout.FOLDERS for _ in (store / folder).glob("[!.]*"))


def worker(place: Path, store: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *PREPARE, "--store", store], cwd=place, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.long
def test_killed_at_twenty_moments_one_and_two_workers_end_with_the_store_of_one(recipe):
    """Ten times the only worker is killed, and the next goes on; ten times one of two, and a new one takes part."""
    rng, total = random.Random(17), shards(recipe / "whole")
    for count in (1, 2):
        store = recipe / f"killed-{count}"
        workers = [worker(recipe, store.name) for _ in range(count)]
        for kill in range(KILLS):
            goal = total * kill // KILLS + rng.randrange(total // KILLS)
            while shards(store) < goal and workers[0].poll() is None:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.2))
            one = workers.pop(rng.randrange(count))
            one.kill()
            one.communicate()
            workers.append(worker(recipe, store.name))
        for one in workers:
            out, _ = one.communicate(timeout=300)
            assert one.returncode == 0, out
            assert "store complete" in out
        assert content(store) == content(recipe / "whole")


@pytest.mark.long
def test_a_launcher_starts_workers_and_one_of_them_speaks(recipe):
    for arguments in ([], ["--fresh"]):
        command = [sys.executable, *TOGETHER, "--store", "together", *arguments]
        done = subprocess.run(command, cwd=recipe, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("store complete") == 1
        assert done.stdout.count("2 processes") == 1
        assert content(recipe / "together") == content(recipe / "whole")
    assert len(list(recipe.glob("together.*"))) == 1


@pytest.mark.long
def test_a_training_of_several_processes_prepares_on_all_of_them(recipe):
    command = [sys.executable, *TOGETHER, "--store", "trained", "--output", "run"]
    command[command.index("profuser.prepare")] = "profuser.train"
    with subprocess.Popen(command, cwd=recipe, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        workers: set[str] = set()
        while process.poll() is None:
            for lease in (recipe / "trained" / FOLDER).glob("*.json"):
                with contextlib.suppress(OSError, ValueError):
                    if json.loads(lease.read_text())["claim"]:
                        workers.add(lease.name)
            time.sleep(0.02)
    assert process.returncode == 0
    assert len(workers) == 2
    assert content(recipe / "trained") == content(recipe / "whole")
