"""A file that a run reads is either proven to be what was written, or the run says so and knows a way out.

    python tests/test_reliability.py 2 1 > docs/reliability.md

This makes all trials in two processes, which takes an hour, and writes the page about them. With 10 in place of 1 it makes every
tenth trial.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from command_runs import STORE, folder, run, without_pictures, without_plan
from conftest import ROOT
from damage import COMMANDS, DAMAGES, OUTCOMES, RUN, Places, Tally, Trial, files_of, make_places, trials, walk
from test_checkpoint import bits_of, saved, trained

from profuser.store import files
from profuser.store.files import DiskFull, write_atomic, writing
from profuser.train.checkpoint import Checkpoint, load_newest

SAMPLE = 6
"""How many of the trials `make test` makes."""
PARTS = 8


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    with without_pictures(), without_plan():
        return make_places(tmp_path_factory.mktemp("places"))


def test_the_walk_comes_to_every_file(places):
    listed = {trial.file for trial in trials(places)}
    on_disk = {str(p.relative_to(places.good)) for p in places.good.glob("runs/**/*") if p.is_file()}
    assert listed >= on_disk
    assert {Path(name).name for name in listed} >= {
        "manifest.json",
        "run.json",
        "state.json",
        "summary.json",
        "metrics.jsonl",
    }
    assert {trial.damage for trial in trials(places)} == set(DAMAGES)


def test_a_sample_of_all_damages_is_survived(places):
    everything = trials(places)
    rng = random.Random(14)
    chosen = [rng.choice([t for t in everything if t.damage == damage]) for damage in DAMAGES]
    tally = walk(places, [*chosen, *rng.sample(everything, SAMPLE - len(chosen))])
    assert not tally.wrong
    assert tally.counts.total() == SAMPLE


# What is most likely to be believed wrongly: in each, one bit is flipped, and every command must still be right.
@pytest.mark.parametrize(
    "file", [f"{RUN}/run.json", pytest.param(f"{STORE}/manifest.json", marks=pytest.mark.long), f"{STORE}/summary.json"]
)
def test_a_flipped_bit_in_a_record_is_survived(places, file):
    command = {"run.json": "evaluate", "manifest.json": "doctor", "summary.json": "report"}[Path(file).name]
    tally = walk(places, [Trial("good", command, file, "a bit flipped", 0.4)])
    assert not tally.wrong
    assert set(tally.counts) == {("a bit flipped", command, "exit 3")}


@pytest.mark.parametrize("command", [pytest.param("report", marks=pytest.mark.long), "evaluate"])
def test_the_manifest_is_blamed_where_it_is_another_stores(places, command):
    """The walk found that a report blamed summary.json, whose advice led to another error, and evaluate the user's data."""
    tally = walk(places, [Trial("good", command, f"{STORE}/manifest.json", "another run's", 0.618)])
    assert not tally.wrong
    assert set(tally.counts) == {("another run's", command, "exit 3")}


def test_a_file_is_missed_without_which_the_model_is_another(places):
    """Without tokenizer_config.json the tokenizer is read all the same, and the scores are others."""
    tally = walk(places, [Trial("good", "evaluate", f"{RUN}/tokenizer_config.json", "deleted", 0.282)])
    assert not tally.wrong
    assert set(tally.counts) == {("deleted", "evaluate", "said to differ")}


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_every_damage_of_every_file_is_survived(places, part):
    tally = walk(places, trials(places)[part::PARTS])
    assert not tally.wrong


def test_a_walk_notices_what_is_wrong(places, monkeypatch):
    monkeypatch.setattr("profuser.train.run_directory.damaged_files", lambda *_: [])
    assert walk(places, [Trial("good", "train", f"{RUN}/model.safetensors", "a bit flipped", 0.5)]).wrong


# -- nothing is left behind ---------------------------------------------------------------------------------------------


def test_what_killed_runs_have_left_is_removed_by_the_next_run_that_holds_the_directory(places):
    with folder(places.good):
        left = [
            Path(RUN, ".scores.json.99.tmp"),
            Path(RUN, "checkpoints/.step-000009.99.tmp"),
            Path(RUN, ".model.99.tmp"),
        ]
        for path in left[1:]:
            path.mkdir()
            (path / "model.safetensors").write_bytes(b"x")
        left[0].write_bytes(b"x")
        for command in ("evaluate", "report", "doctor", "prepare"):
            assert run(*COMMANDS[command])[0] == 0
        assert all(path.exists() for path in left)
        assert run(*COMMANDS["train"])[0] == 0
        assert not any(path.exists() for path in left)


def test_a_run_that_was_killed_before_its_record_was_written_begins_again(places):
    with folder(places.good):
        place = Path("elsewhere")
        place.mkdir()
        (place / ".run.json.99.tmp").write_bytes(b"x")
        code, _, err = run(*COMMANDS["train"], "--output", "elsewhere")
        assert code == 0, err
        assert not list(place.glob(".*.tmp"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_named_with_what_is_missing(tmp_path, monkeypatch, code):
    def full(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DiskFull, match=r"x\.json needs 1,000 bytes, [\d,]+ are free on its disk .*make room"):
        write_atomic(tmp_path / "x.json", b"x" * 1000)
    assert not list(tmp_path.iterdir())


def test_safetensors_own_error_of_a_full_disk_is_known(tmp_path):
    with pytest.raises(DiskFull, match="model needs 7 bytes"), writing(tmp_path / "model", 7):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_directory_in_the_place_of_a_file_is_renamed(tmp_path, capsys):
    (tmp_path / "x.json").mkdir()
    (tmp_path / "x.json/mine.txt").write_text("mine")
    write_atomic(tmp_path / "x.json", b"{}")
    assert (tmp_path / "x.json").read_bytes() == b"{}"
    assert [path.read_text() for path in tmp_path.glob("x.json.*/mine.txt")] == ["mine"]
    assert "was a directory: renamed to" in capsys.readouterr().out


# -- the same in every surrounding ------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "surrounding", [{"PYTHONOPTIMIZE": "2"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
def test_neither_optimisation_nor_the_locale_changes_what_is_refused(places, surrounding):
    environment = os.environ | surrounding | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "profuser.evaluate", RUN]
    with folder(places.good):
        path = Path(STORE, "manifest.json")
        path.write_bytes(path.read_bytes().replace(b'"top_k": 10', b'"top_k": 11'))
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
        assert "manifest.json must hold what was written" in done.stderr


# -- the page -------------------------------------------------------------------------------------------------------------

HARM = """\
## Signals, and input that means harm

SIGTERM and Ctrl-C end every command with the exit codes 75 and 130 and one line, from its first lines until the interpreter is
taken down, where they are ignored. Forty signals at seeded moments, every second one to the whole process group, lost nothing: the
same command went on to the same bits (`pytest tests/test_stopping.py -m long`). A second signal does not wait for a checkpoint.

A model is loaded or merged as a whole or refused. Recipes and the headers of GGUF files have limits, and pipes and devices are
refused in the place of files. Chat templates are rendered within 20 s and 1 GiB in a process of their own. In another one a
tokenizer's regular expressions are tried, for 5 s at most, on texts that are hard for them.

`generate` goes on behind the rows of `--output` only if each is what was written, by the same sources and settings. `doctor
--sources` takes an answer that it kept only from the place where it was put.

Not promised: a regular expression that is hard for other texts than those, configurations that are wrong but have the right shapes,
and the first millisecond of a process."""
PAGE = """\
# Reliability

A file that a run reads is either proven to be what was written, or the run says so and knows a way out.

A store, a run and each checkpoint have one record: `manifest.json`, `run.json` and `state.json`. It holds the sha256 and the size
of the files beside it, is written after them, and has a seal: the sha256 of all its own entries. Each line of `metrics.jsonl` has
a seal as well, and so has the record that each shard of a store has until the manifest lists it. Weights are hashed when they are
written, and checked where a run relies on them.

## What is promised

- `train` resumes from the newest checkpoint of which every file is what was written. One that is not is passed over for the one
  before, and a line says why. Where none is left, training begins at step 0.
- `prepare` and `train` make a damaged shard, `examples.safetensors`, `summary.json` or `samples.parquet` again and say so. `train`
  scores again where scores are damaged, takes lost metrics from a checkpoint, and writes a model that cannot be read again from the
  last checkpoint.
- The fused model may be edited on purpose. `train` and `evaluate` say which of its files differ, and use them as they are,
  and `evaluate` also which are missing.
- `evaluate`, `report`, `doctor` and `store` change nothing in a store. Where something is damaged that they need, they end with
  exit code 3 and one line, and what the line advises works.
- What killed processes leave while they are writing is removed by the next run that holds the directory.
- A full disk is named with the path, the bytes that are needed and those that are free.

## What is not promised

- A digest says that a file is what was written, and not who wrote it. Whoever may write to a store or a run can write another
  record, and with it train another model. Keep directories that others can write to out of your recipes.
- The models and data that a recipe names are not ours. A store knows them by a fingerprint, for which large files are sampled. A
  damaged model that loads is noticed only as far as that sample reaches.
- Files that nothing reads, such as the pictures and `report.html`, are not checked. `report` writes them again.
- `manifest.json` of a store and `run.json` of a run are the records that everything else is proven by, and nothing can prove them anew. If
  one of them is lost or damaged and you have no copy, the line that says so starts the store or the run over, at the cost of preparing
  or training again. Keep copies of these two small files where that is dear.
- Two damages at once may cost more than either: without any checkpoint, lost lines of `metrics.jsonl` stay lost, and a lost
  model is trained again.

## What was tried

"""


def bits_survived() -> dict[str, int]:
    """Flips every bit of a state.json, and counts how the newest checkpoint was then found."""
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(None):
        model, optimizer = trained()
        saved(Path(name), 1, model, optimizer)
        path = saved(Path(name), 2, model, optimizer) / "state.json"
        whole = load_newest(Path(name), model, optimizer)
        for data in bits_of(path.read_bytes()):
            path.write_bytes(data)
            try:
                one = load_newest(Path(name), model, optimizer)
            except Exception:  # whatever is raised, the run would not have gone on, and this is what is counted
                found["failed"] += 1
                continue
            before = one == Checkpoint(1, "targets", b"metrics")
            found["the same" if one == whole else "the one before" if before else "wrong"] += 1
    return found


def tables(places: Places, tally: Tally, every: int) -> str:
    """Returns what was tried and became of it, as tables. `every` says that every so many of the trials were made."""
    share = "all" if every == 1 else f"one in {every}, evenly spread,"
    lines = [
        f"There are {len(trials(places)):,} trials, of which {share} were made for this table: "
        f"{len(files_of(places.good))} files of a finished run and its store, and what an interrupted run resumes from. Each file "
        "was truncated, emptied, changed by one bit at ten places, deleted, replaced by a directory, and replaced by another "
        "run's; after each damage the commands ran, each in a fresh copy. An advice was followed, and had to help.",
        "",
        f"| damage | command | trials | {' | '.join(OUTCOMES)}, advice followed | wrong |",
        f"|---|---|---:|{'---:|' * len(OUTCOMES)}---:|",
    ]
    for damage in DAMAGES:
        for command in COMMANDS:
            counts = [tally.counts[damage, command, outcome] for outcome in OUTCOMES]
            wrong = sum(f"{command} in" in line and f" {damage} (" in line for line in tally.wrong)
            total = sum(counts) + wrong
            lines.append(f"| {damage} | `{command}` | {total} | {' | '.join(map(str, counts))} | {wrong} |")
    bits = bits_survived()
    lines += [
        "",
        f"Of the {sum(bits.values()):,} bits of a `state.json`, each was flipped: {bits['the one before']:,} times the checkpoint "
        f"before it was used and a line said why, {bits['the same']} times the same state was read, {bits['wrong']} times "
        f"another, and {bits['failed']} times the resumption failed.",
        "",
        "`tests/test_json_fuzz.py` puts other values into every JSON file that is read, under a right seal and digest: 10,000 into "
        "our own files, 2,000 into those of a report and of a model. Each was used, or refused in one line.",
        "",
        f"`python tests/test_reliability.py 2 {every} > docs/reliability.md` makes all of these trials but the last, and writes "
        "this page.",
    ]
    return "\n".join(lines)


def walk_part(places: Places, every: int, part: int, parts: int) -> Tally:
    """Makes one part of the trials, in a process of its own."""
    torch.set_num_threads(1)
    return walk(places, trials(places)[::every][part::parts])


def main() -> None:
    processes, every = map(int, sys.argv[1:])
    parts = max(1, 400 // every)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        places = make_places(Path(root))
        tally = Tally()
        with ProcessPoolExecutor(processes) as pool:
            for part in pool.map(partial(walk_part, places, every, parts=parts), range(parts)):
                tally.counts += part.counts
                tally.wrong += part.wrong
                print(
                    f"{tally.counts.total()} trials, {len(tally.wrong)} wrong", *part.wrong, sep="\n", file=sys.stderr
                )
        print(PAGE + tables(places, tally, every) + "\n\n" + HARM)
    print(f"{time.monotonic() - begin:.0f} s", file=sys.stderr)
    sys.exit(bool(tally.wrong))


if __name__ == "__main__":
    main()
