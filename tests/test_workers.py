"""Several processes make one store together, and it does not depend on how many they were nor on which of them were lost.

`python -m pytest tests/test_workers.py -m long` kills them at twenty seeded moments, and starts them by torchrun.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
from conftest import ROOT, small_run
from test_lease import another_process, held, leases

from profuser.prepare.phases import prepare
from profuser.store import layout
from profuser.store.records import FOLDER as RECORDS
from profuser.store.store import Store

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def never(_: str) -> bool:
    return False


def content(store: Path) -> dict[str, object]:
    """All files of a store, but for how long its phases took."""
    files: dict[str, object] = {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}
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


def test_two_workers_make_what_one_would(prepared, tmp_path):
    """The two are threads, which leases and claims do not tell from processes. Models cannot be loaded so: theirs is there."""
    run = small_run(tmp_path)
    shutil.copytree(prepared[2].directory, run.store_dir)
    for path in [*run.store_dir.glob("scores/*"), *run.store_dir.glob("targets/*"), run.store_dir / "samples.parquet"]:
        path.unlink()
    made: dict[str, set[int]] = {}
    put = Store.put

    def noting(store: Store, kind: layout.Kind, number: int, *arguments, **others) -> None:
        made.setdefault(kind.shard(number), set()).add(threading.get_ident())
        time.sleep(0.02)
        put(store, kind, number, *arguments, **others)

    with mock.patch.object(Store, "put", noting), ThreadPoolExecutor(2) as threads:
        for done in [threads.submit(prepare, run) for _ in range(2)]:
            assert done.result().complete
    assert content(run.store_dir) == content(prepared[2].directory)
    assert all(len(by) == 1 for by in made.values())
    assert len(set.union(*made.values())) == 2
