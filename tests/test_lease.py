"""Who may use a directory at the same time, and what becomes of a lease whose process has ended."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from command_runs import RECIPE, rows, write_rows
from conftest import ROOT

from profuser.errors import ConfigError, DataError
from profuser.pipeline import train
from profuser.prepare.phases import prepare
from profuser.recipe.compare import differing_keys
from profuser.store import lease
from profuser.store.lease import EXPIRES_SECONDS, FOLDER, Use, hold, set_aside
from profuser.train.loop import Trainer
from profuser.train.run_directory import RunDirectory
from profuser.typed import read_json

HOLDER = """\
import os, sys, time
from pathlib import Path
from profuser.recipe.compare import differing_keys
from profuser.store.lease import hold
with hold(Path(sys.argv[1]), "store", {"mode": "bytes"}, differing_keys, use="alone"):
    if len(sys.argv) > 2 and os.fork() > 0:
        time.sleep(60)
    print("held", flush=True)  # by the child, where there is one
    time.sleep(60)
"""


def held(directory: Path, mode: str = "bytes", *, use: Use = "alone"):
    return hold(directory, "store", {"mode": mode}, differing_keys, use=use)


@contextlib.contextmanager
def another_process(directory: Path, *arguments: str, program: str = HOLDER) -> Generator[subprocess.Popen]:
    """A process that uses the directory, until it is killed."""
    command = [sys.executable, "-c", program, str(directory), *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):  # all of its processes have been killed already
                os.killpg(process.pid, signal.SIGKILL)


def leases(directory: Path) -> list[Path]:
    return sorted((directory / FOLDER).glob("*.json"))


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_nothing_is_left_when_the_hold_ends(tmp_path):
    with held(tmp_path / "new"):
        assert len(leases(tmp_path / "new")) == 1
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    with pytest.raises(KeyError), held(tmp_path / "old"):
        raise KeyError
    assert list((tmp_path / "old").iterdir()) == []


@pytest.mark.parametrize("fault", [FileExistsError, FileNotFoundError])
def test_a_folder_that_goes_while_it_is_entered_is_made_again(tmp_path, monkeypatch, fault):
    """`mkdir` of a folder that another process removes at this moment raises either of the two."""
    mkdir, faults = Path.mkdir, iter([fault()] * 3)

    def raced(path, *args, **kwargs):
        if path.name == FOLDER and (raised := next(faults, None)):
            raise raised
        return mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", raced)
    with held(tmp_path):
        assert len(leases(tmp_path)) == 1


def test_a_file_where_the_leases_should_be_is_an_error(tmp_path):
    (tmp_path / FOLDER).write_text("")
    with pytest.raises(FileExistsError), held(tmp_path):
        pass


def test_a_lease_says_who_holds_it_since_when_and_with_which_settings(tmp_path):
    with held(tmp_path):
        record = json.loads(leases(tmp_path)[0].read_text())
    assert record["pid"] == os.getpid()
    assert record["host"]
    assert record["since"].startswith("20")
    assert record["settings"] == {"mode": "bytes"}
    assert record["use"] == "alone"
    assert record["claim"] == ""


@pytest.mark.parametrize("use", get_args(Use))
@pytest.mark.parametrize("other_use", get_args(Use))
def test_other_settings_are_refused_at_once_and_named(tmp_path, use, other_use):
    with (
        held(tmp_path, use=use),
        pytest.raises(ConfigError, match=rf"mode differ\) by process {os.getpid()} on .*--store"),
        held(tmp_path, "fusellm", use=other_use),
    ):
        pass
    with held(tmp_path, "fusellm"):
        pass


def test_many_may_read_at_a_time(tmp_path):
    with held(tmp_path, use="reads"), held(tmp_path, use="reads"):
        assert len(leases(tmp_path)) == 2


@pytest.mark.parametrize(
    ("first", "second"), [("alone", "reads"), ("reads", "alone"), ("alone", "alone"), ("reads", "works")]
)
def test_with_the_same_settings_one_who_changes_and_others_wait_for_each_other(
    tmp_path, first, second, capsys, monkeypatch
):
    monkeypatch.setattr(lease, "POLL_SECONDS", 0.05)
    order = []

    def later() -> None:
        with held(tmp_path, use=second):
            order.append("second")

    thread = threading.Thread(target=later)
    with held(tmp_path, use=first):
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert f"in use with the same settings by process {os.getpid()} on" in out
    assert "waiting" in out


def test_who_is_done_with_changing_lets_readers_in(tmp_path):
    with held(tmp_path) as first:
        first.share("reads")
        with held(tmp_path, use="reads"):
            assert len(leases(tmp_path)) == 2


def test_a_process_in_another_one_is_seen(tmp_path):
    with (
        another_process(tmp_path) as process,
        pytest.raises(ConfigError, match=f"process {process.pid} on"),
        held(tmp_path, "fusellm"),
    ):
        pass


@pytest.mark.parametrize("arguments", [(), ("with a child",)])
def test_the_lease_of_a_killed_process_does_not_count(tmp_path, arguments):
    """Not even while a process lives that it has forked, such as one that prepares batches."""
    with another_process(tmp_path, *arguments) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(leases(tmp_path)) == 1
        with held(tmp_path, "fusellm"):
            assert len(leases(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def left_over(directory: Path, **changes) -> Path:
    """A lease whose process was killed, changed as if it were another's."""
    with another_process(directory) as process:
        process.kill()
        process.wait()
    (path,) = leases(directory)
    rewrite(path, **changes)
    return path


def test_a_process_id_that_was_given_to_another_process_does_not_count(tmp_path):
    left_over(tmp_path, pid=os.getppid())
    with held(tmp_path, "fusellm"):
        pass


def test_another_container_on_this_kernel_does_not_count_when_it_has_ended(tmp_path):
    left_over(tmp_path, pid=1, host="a1b2c3d4e5f6")
    with held(tmp_path, "fusellm"):
        pass


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"boot": "another"}, f"noticed after {EXPIRES_SECONDS} s"), ({"device": 2**40}, r"mode differ\) by process")],
    ids=["before a reboot, or on another machine", "another mount, with locks of its own, as of FUSE"],
)
def test_a_lease_whose_lock_may_not_be_seen_here_counts_until_it_expires(tmp_path, changes, says):
    path = left_over(tmp_path, **changes)
    with pytest.raises(ConfigError, match=says), held(tmp_path, "fusellm"):
        pass
    old = time.time() - EXPIRES_SECONDS - 5
    os.utime(path, (old, old))
    with held(tmp_path, "fusellm"):
        pass


def test_a_lease_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "RENEWED_SECONDS", 0.05)
    with held(tmp_path):
        (path,) = leases(tmp_path)
        os.utime(path, (1, 1))
        time.sleep(0.5)
        assert path.stat().st_mtime > 1


def test_a_file_that_is_no_lease_does_no_harm_and_goes_when_it_is_old(tmp_path, monkeypatch):
    """Over a network a lease that is being renewed may seem empty, so that a new one stays."""
    monkeypatch.setattr(lease, "READ_AGAIN_SECONDS", 0)
    (tmp_path / FOLDER).mkdir()
    for name, age in (("new", 0), ("old", EXPIRES_SECONDS + 5)):
        (tmp_path / FOLDER / f"{name}.json").write_text("{")
        os.utime(tmp_path / FOLDER / f"{name}.json", (time.time() - age,) * 2)
    with held(tmp_path):
        assert not (tmp_path / FOLDER / "old.json").exists()
    assert [path.name for path in (tmp_path / FOLDER).glob("*.json")] == ["new.json"]


def test_a_lease_that_seems_empty_for_a_moment_is_read_again(tmp_path, monkeypatch):
    seen = []

    def empty_at_first(*arguments, **options):
        seen.append(arguments)
        if len(seen) < lease.READINGS:
            raise DataError("is empty")
        return read_json(*arguments, **options)

    monkeypatch.setattr(lease, "READ_AGAIN_SECONDS", 0)
    with another_process(tmp_path):
        monkeypatch.setattr(lease, "read_json", empty_at_first)
        with pytest.raises(ConfigError, match="in use with other settings"), held(tmp_path, "fusellm"):
            pass
    assert len(seen) == lease.READINGS


def test_what_cannot_be_written_to_can_be_read_without_a_lease(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lease, "_enter", refuse)
    with held(tmp_path, use="reads") as nothing:
        nothing.share("reads")
    with pytest.raises(OSError, match="Read-only"), held(tmp_path):
        pass


def test_nothing_in_use_is_set_aside(tmp_path):
    directory = tmp_path / "d"
    assert set_aside(directory, "run") is None
    directory.mkdir()
    with held(directory, use="reads"), pytest.raises(ConfigError, match=r"--fresh .* in use by process .*--output"):
        set_aside(directory, "run")
    aside = set_aside(directory, "run")
    assert aside is not None
    assert list(aside.iterdir()) == []
    assert not directory.exists()


def test_only_one_of_many_is_inside(tmp_path):
    """Eight processes change the same directory in turn; none may find another's traces."""
    program = """\
import sys, time
from pathlib import Path
from profuser.recipe.compare import differing_keys
from profuser.store.lease import hold
for _ in range(5):
    with hold(Path(sys.argv[1]), "store", {}, differing_keys, use="alone"):
        trace = Path(sys.argv[1]) / "trace"
        trace.touch(exist_ok=False)
        time.sleep(0.01)
        trace.unlink()
"""
    program = program.replace(
        "import sys, time", "import sys, time\nfrom profuser.store import lease\nlease.POLL_SECONDS = 0.01"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "d")]
    processes = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) for _ in range(8)]
    assert [process.wait(120) for process in processes] == [0] * 8


# Whole commands.


def command(*arguments: str, place: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", *arguments],
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def both(first: list[str], second: list[str], place: Path) -> list[tuple[int, str, str]]:
    """Starts two commands a moment after each other, and returns the exit code, stdout and stderr of both."""
    started = [command(*first, place=place)]
    time.sleep(0.2)
    started.append(command(*second, place=place))
    ended = [process.communicate(timeout=300) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, ended)]


@pytest.fixture
def fresh(tmp_path) -> Path:
    """A folder with a recipe and its data, in which nothing was run."""
    recipe = RECIPE.replace("./guardian", "demo:guardian").replace("heldout: heldout.jsonl, ", "")
    (tmp_path / "recipe.yaml").write_text(recipe.replace("evaluation: {", "# evaluation: {"))
    write_rows(str(tmp_path / "train.jsonl"), rows("fusion", 6))
    return tmp_path


PREPARE = ["profuser.prepare", "--config", "recipe.yaml"]
TRAIN = ["profuser.train", "--config", "recipe.yaml"]


@pytest.mark.long
def test_two_alignments_at_once_on_one_store_end_with_one_of_them(fresh):
    results = both(PREPARE, [*PREPARE, "--align.mode", "fusellm"], fresh)
    assert sorted(code for code, _, _ in results) == [0, 2], results
    (err,) = (err for code, _, err in results if code == 2)
    assert err.count("\n") == 1
    assert "align.mode differ" in err
    assert "process" in err
    (out,) = (out for code, out, _ in results if code == 0)
    assert "store complete" in out


@pytest.mark.long
def test_the_same_training_twice_at_once_is_done_once(fresh):
    results = both(TRAIN, TRAIN, fresh)
    assert [code for code, _, _ in results] == [0, 0], results
    waited = [out for _, out, _ in results if "waiting for it" in out]
    assert len(waited) == 1
    assert "is complete already" in waited[0]
    assert sum("steps in" in out for _, out, _ in results) == 1
    assert not list(fresh.rglob(FOLDER))


def test_another_recipe_cannot_train_in_the_same_run_directory_meanwhile(prepared, tmp_path):
    _, small, _ = prepared
    recipe = replace(small.recipe, output=str(tmp_path / "run"))
    other = replace(recipe, optim=replace(recipe.optim, lr=0.1), store="other")
    with (
        RunDirectory(replace(small, recipe=recipe)).held(),
        pytest.raises(ConfigError, match=r"optim\.lr, store differ\) by process .*--output"),
        RunDirectory(replace(small, recipe=other)).held(),
    ):
        pass


def test_a_run_directory_of_something_else_gets_no_lease(prepared, tmp_path):
    _, small, _ = prepared
    (tmp_path / "thesis.txt").write_text("mine")
    with (
        pytest.raises(DataError, match=r"run\.json"),
        RunDirectory(replace(small, recipe=replace(small.recipe, output=str(tmp_path)))).held(),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_store_from_which_a_run_learns_is_not_made_anew_with_other_settings(prepared, tmp_path, monkeypatch):
    """While one run trains on a complete store, others may use it as it is, but none may align it anew."""
    _, small, store = prepared
    mine = replace(small, recipe=replace(small.recipe, output=str(tmp_path / "run")))
    other = replace(small, recipe=replace(small.recipe, align=replace(small.recipe.align, mode="fusellm")))
    before = {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file()}

    def meanwhile(trainer: Trainer) -> None:
        assert prepare(mine).complete
        with pytest.raises(ConfigError, match=r"align\.mode differ"):
            prepare(other)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        train(mine)
    assert {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file()} == before
