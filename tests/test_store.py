"""A store: what was put comes back or is refused, changed settings drop what depends on them, and reading changes nothing."""

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from profuser.errors import ConfigError, DataError
from profuser.ragged import ragged, slots_of
from profuser.store import layout
from profuser.store.__main__ import answered_by
from profuser.store.__main__ import main as store_command
from profuser.store.files import ABANDONED_SECONDS, TEMPORARY, remove_left_over, set_aside, temporary_beside
from profuser.store.layout import CAPTURE_COLUMNS, Kind, kind_of, shard_arrays
from profuser.store.manifest import SCHEMA_VERSION
from profuser.store.sealed import write_sealed
from profuser.store.settings import StoreSettings
from profuser.store.store import Store

SUMMARY = {"sources": ["a"], "target": "a", "examples": 5, "handled": {}}
VOTES = {"asked": ["rm", "check"], "judges": {"rm": {"files": "1"}, "check": {"files": "2"}}}
SETTINGS = StoreSettings(
    sources={
        "source_names": ["a"],
        "sources": {"a": {"model": "1"}},
        "target": {"name": "a"},
        "capture": {"top_k": 10, "dtype": "float32"},
        "data": {"train": "1"},
        "date": "2026-01-31",
    },
    votes=VOTES,
    targets={"mode": "bytes", "rule": 1},
)
TRUTH, TARGETS, TEXTS = layout.truth("train", "a"), layout.targets("train"), layout.responses("train", "a")


SHARD = {"sha256": "0" * 64, "bytes": 0, "examples": 0, "origin": ""}


def changed(**layers) -> StoreSettings:
    return dataclasses.replace(SETTINGS, **layers)


def rewrite_manifest(store: Store, **changes) -> None:
    path = store.directory / "manifest.json"
    write_sealed(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def store(tmp_path):
    store = Store.build(tmp_path / "store", SETTINGS, {})
    store.put(TRUTH, 0, {"x": np.arange(5, dtype=np.float16)}, examples=5)
    index = {"example": np.arange(5), "mode": np.zeros(5, np.uint8), "offsets": np.arange(6)}
    store.put(TARGETS, 0, index | {"y": np.ones((2, 3), np.int32), "none": np.zeros((0, 4), np.uint8)}, examples=5)
    store.put_json(TEXTS, 0, [[["hé", True, 0]]], examples=5)
    store.put_finding("summary.json", json.dumps(SUMMARY).encode())
    store.put_finding("samples.parquet", b"a table")
    store.finish({"judge": 1.5})
    return store


def test_what_was_put_comes_back(store):
    again = Store.open(store.directory)
    assert again.get(TRUTH, 0)["x"].tolist() == [0, 1, 2, 3, 4]
    assert again.get(TRUTH, 0)["x"].dtype == np.float16
    arrays = again.get(TARGETS, 0)
    assert (arrays["y"].shape, arrays["none"].shape) == ((2, 3), (0, 4))
    assert again.get_json(TEXTS, 0) == [[["hé", True, 0]]]
    assert [again.numbers(kind) for kind in (TRUTH, TARGETS, TEXTS)] == [[0], [0], [0]]
    assert again.index(TARGETS, 0)["example"].tolist() == [0, 1, 2, 3, 4]
    assert again.index(TRUTH, 0) == {}


def test_what_comes_back_cannot_be_written_to(store):
    with pytest.raises(ValueError, match="read-only"):
        store.get(TRUTH, 0)["x"][0] = 1


@pytest.mark.parametrize(
    "kind", [TRUTH, TARGETS, TEXTS, layout.scores("rm"), layout.winners("b-0.5"), layout.truth("heldout", "0-00000")]
)
def test_a_shards_name_tells_its_kind_and_number(kind):
    for number in (0, 42, 123456):
        assert kind_of(kind.shard(number)) == (kind, number)


@pytest.mark.parametrize(
    "name", ["", "truth/train-a", "../truth/train-a-00000", "weights/train-a-00000", "truth/train-a-0001"]
)
def test_what_is_no_shards_name_is_refused(name):
    with pytest.raises(ValueError, match="names no shard"):
        kind_of(name)


def test_a_source_whose_name_begins_like_anothers_is_not_meant(store):
    longer = Kind("truth", "train", "a-2")
    store.put(longer, 0, {"x": np.ones(1)}, examples=1)
    assert store.numbers(TRUTH) == [0]
    assert store.digest(TRUTH) != store.digest(longer)


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_a_truncated_shard_is_refused_and_dropped_for_rebuilding(store, cut):
    path = store.directory / f"{TRUTH.shard(0)}.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    store = Store.open(store.directory)
    with pytest.raises(DataError, match="a-00000"):
        store.get(TRUTH, 0)
    with pytest.raises(DataError, match="a-00000"):
        store.index(TRUTH, 0)
    assert store.damaged() == [TRUTH.shard(0)]
    store.drop_damaged()
    with pytest.raises(DataError, match="not complete"):
        Store.open(store.directory)
    assert not Store.open(store.directory, complete=False).has(TRUTH, 0)


def test_a_damaged_shard_that_the_manifest_does_not_list_yet_is_dropped_for_good(store):
    store.put(TRUTH, 1, {"x": np.ones(5, dtype=np.float16)}, examples=5)
    (store.directory / f"{TRUTH.shard(1)}.safetensors").write_bytes(b"")
    again = Store.open(store.directory)
    again.drop_damaged()
    assert not again.has(TRUTH, 1)
    assert not Store.open(store.directory, complete=False).has(TRUTH, 1)


def test_every_flipped_byte_is_refused_when_read_and_in_the_index_at_once(store):
    path = store.directory / f"{TARGETS.shard(0)}.safetensors"
    data = path.read_bytes()
    at_once = 0
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        fresh = Store.open(store.directory)
        with pytest.raises(DataError, match="sha256"):
            fresh.get(TARGETS, 0)
        try:
            fresh.index(TARGETS, 0)
        except DataError:
            at_once += 1
    values = 2 * 3 * 4
    assert at_once == len(data) - values


def test_a_shard_that_is_written_anew_is_checked_anew(store):
    store.get(TRUTH, 0)
    store.put(TRUTH, 0, {"x": np.ones(5, dtype=np.float16)}, examples=5)
    path = store.directory / f"{TRUTH.shard(0)}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(DataError, match="its content differs"):
        store.get(TRUTH, 0)


def test_a_changed_text_file_is_refused(store):
    (store.directory / f"{TEXTS.shard(0)}.json").write_text("[]")
    with pytest.raises(DataError, match="a-00000"):
        store.get_json(TEXTS, 0)


def test_a_missing_shard_is_refused(store):
    (store.directory / f"{TRUTH.shard(0)}.safetensors").unlink()
    for read in (lambda: store.get(TRUTH, 0), lambda: store.get(TRUTH, 1), lambda: store.index(TRUTH, 0)):
        with pytest.raises(DataError, match="cannot be read"):
            read()


def test_other_capture_settings_need_another_store(store):
    other = SETTINGS.sources | {"capture": {"top_k": 5, "dtype": "float32"}, "sources": {"a": {"model": "2"}}}
    with pytest.raises(ConfigError, match=r"capture\.top_k, sources\.a\.model differ"):
        Store.build(store.directory, changed(sources=other), {})


def test_other_model_files_are_not_the_stores(tmp_path):
    with_files = [changed(sources=SETTINGS.sources | {"sources": {"a": {"files": x}}}) for x in "12"]
    Store.build(tmp_path / "s", with_files[0], {})
    with pytest.raises(DataError, match=r"sources\.a\.files"):
        Store.build(tmp_path / "s", with_files[1], {})


def test_a_changed_judge_votes_again_and_the_answers_and_the_others_scores_stay(store, capsys):
    rm, check, winners = layout.scores("rm"), layout.scores("check"), layout.winners("a")
    for kind in (rm, check, winners):
        store.put(kind, 0, {"x": np.ones(1)}, examples=1)
    another_check = VOTES | {"judges": VOTES["judges"] | {"check": {"files": "3"}}}
    again = Store.build(store.directory, changed(votes=another_check), {})
    assert "judges changed (check): voting again" in capsys.readouterr().out
    there = [kind for kind in (rm, check, winners, TARGETS, TRUTH, TEXTS) if again.has(kind, 0)]
    assert there == [rm, TRUTH, TEXTS]
    assert not again.complete
    without = Store.build(store.directory, changed(votes={"asked": [], "judges": {}}), {})
    assert without.has(rm, 0)
    assert Store.build(store.directory, changed(votes=another_check), {}).has(rm, 0)


def test_another_alignment_drops_the_targets_and_keeps_the_captures(store):
    again = Store.build(store.directory, changed(targets={"mode": "bytes", "rule": 2}), {})
    assert not again.has(TARGETS, 0)
    assert again.has(TRUTH, 0)
    assert not again.complete


@pytest.mark.parametrize(
    ("settings", "outdated"),
    [
        (SETTINGS, []),
        (changed(targets={"mode": "bytes", "rule": 2}), ["targets"]),
        (changed(votes=VOTES | {"asked": ["rm"]}), ["winners", "targets"]),
        (changed(targets={"mode": "bytes", "rule": 1, "follow_numbers": False}), ["targets"]),
        (changed(targets={"mode": "bytes", "rule": 1, "follow_numbers": True}), ["truth", "winners", "targets"]),
    ],
)
def test_asking_what_changed_changes_nothing(store, settings, outdated):
    before = {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file()}
    changes = Store.open(store.directory).changes(settings)
    changes.check(store.directory)
    kinds = (layout.truth("train", "a"), TEXTS, layout.scores("rm"), layout.winners("a"), TARGETS)
    assert [kind.folder for kind in kinds if changes.outdates(kind)] == outdated
    assert {path: path.read_bytes() for path in store.directory.rglob("*") if path.is_file()} == before


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"manifest\.json"):
        Store.build(tmp_path, SETTINGS, {})


@pytest.mark.parametrize("schema", [4, 99])
def test_another_schema_is_refused_with_the_command(store, schema):
    rewrite_manifest(store, schema=schema)
    for use in (lambda: Store.build(store.directory, SETTINGS, {}), lambda: Store.open(store.directory)):
        with pytest.raises(DataError, match=rf"schema {schema}, this version reads .*profuser\.prepare --fresh"):
            use()


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (4, "schema 4, this version reads"),
        (SCHEMA_VERSION, "must hold sha256, which is missing"),
        (0, "must hold"),
        (-3, "must hold"),
    ],
)
def test_a_manifest_without_a_seal_is_one_of_an_earlier_schema_or_damaged(store, schema, message):
    path = store.directory / "manifest.json"
    manifest = json.loads(path.read_text()) | {"schema": schema}
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=message):
        Store.open(store.directory)


def test_a_broken_manifest_is_refused(store):
    (store.directory / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        Store.build(store.directory, SETTINGS, {})


def flip(path, at, bit):
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_no_flipped_bit_of_the_manifest_is_believed(store):
    path = store.directory / "manifest.json"
    whole = path.read_bytes()
    for at in range(len(whole)):
        flip(path, at, at % 8)
        with pytest.raises(DataError, match=r"profuser\.prepare --fresh"):
            Store.open(store.directory)
        path.write_bytes(whole)


@pytest.mark.parametrize("name", ["summary.json", "samples.parquet"])
@pytest.mark.parametrize("cut", [0, 5, None])
def test_a_damaged_finding_is_noticed(store, name, cut):
    path = store.directory / name
    path.write_bytes(path.read_bytes()[:cut]) if cut is not None else path.unlink()
    again = Store.open(store.directory)
    assert again.damaged_findings() == [name]
    assert Store.finished(store.directory, SETTINGS) is None
    if name == "summary.json":
        with pytest.raises(DataError, match=r"profuser\.prepare` with the recipe, which writes it again"):
            again.handled()


def test_a_store_of_an_earlier_schema_is_refused_and_stays_as_it_is(store):
    path = store.directory / "manifest.json"
    write_sealed(path, {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"} | {"schema": 7})
    before = path.read_bytes()
    for use in (Store.open, lambda directory: Store.build(directory, SETTINGS, {})):
        with pytest.raises(DataError, match=r"has schema 7, this version reads 8; prepare it again with .*--fresh"):
            use(store.directory)
    assert path.read_bytes() == before


def test_another_stores_manifest_is_noticed(store, tmp_path):
    other = changed(sources=SETTINGS.sources | {"capture": {"top_k": 5, "dtype": "float32"}})
    foreign = Store.build(tmp_path / "other", other, {})
    foreign.put(TRUTH, 0, {"x": np.arange(6, dtype=np.float16)}, examples=5)
    foreign.finish()
    shutil.copy(foreign.directory / "manifest.json", store.directory / "manifest.json")
    with pytest.raises(DataError, match=r"must describe the shards beside it, .*capture\.top_k.*--fresh"):
        Store.build(store.directory, SETTINGS, {})


def test_what_a_killed_preparation_has_left_is_removed_by_the_next(store):
    left = [store.directory / ".manifest.json.123.tmp", store.directory / "truth/.train-a-00001.safetensors.123.tmp"]
    others = [store.directory / ".notes.tmp", store.directory / "truth/mine.tmp"]
    for path in (*left, *others):
        path.write_bytes(b"x")
    Store.open(store.directory)
    assert all(path.exists() for path in left)
    Store.build(store.directory, SETTINGS, {})
    assert [path.exists() for path in (*left, *others)] == [False, False, True, True]


def test_what_processes_on_other_machines_have_left_goes_after_a_day(tmp_path):
    """Nothing is known here of these processes. A directory is as old as the newest file in it."""
    old, grows, new = (tmp_path / f".model.{'0' * 8}.{process}.tmp" for process in (1, 2, 3))
    for folder in (old, grows, new):
        folder.mkdir()
        (folder / "weights").write_bytes(b"half")
    for path in (old / "weights", old, grows):
        os.utime(path, (time.time() - ABANDONED_SECONDS - 60,) * 2)
    remove_left_over(tmp_path / "model")
    assert [path.exists() for path in (old, grows, new)] == [False, True, True]


def test_what_is_written_beside_a_file_of_a_longer_name_is_left_alone(tmp_path):
    longer = temporary_beside(tmp_path / "model.safetensors")
    longer.touch()
    remove_left_over(tmp_path / "model")
    assert longer.exists()


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="containers are made by unshare, as root"
)
def test_processes_with_the_same_id_in_two_containers_write_under_two_names(tmp_path):
    code = f"from pathlib import Path; from profuser.store import files; print(files.temporary_beside(Path('{tmp_path}/x'))); input()"
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
    with contextlib.ExitStack() as stack:
        containers = [
            stack.enter_context(subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
            for _ in range(2)
        ]
        names = [Path(container.stdout.readline().strip()).name for container in containers if container.stdout]
        for container in containers:
            container.communicate("\n")
    if any(container.returncode for container in containers):
        pytest.skip("unshare is not allowed here")
    assert all(name.endswith(".1.tmp") and TEMPORARY.fullmatch(name) for name in names)
    assert names[0] != names[1]


def test_no_shard_name_leaves_the_store(store):
    rewrite_manifest(store, shards={"../../evil": SHARD})
    with pytest.raises(DataError, match="not to be trusted"):
        Store.open(store.directory)
    rewrite_manifest(store, shards={"truth/train-../../../../../evil-00000": SHARD})
    with pytest.raises(DataError, match="inside"):
        Store.open(store.directory).get(Kind("truth", "train", "../../../../../evil"), 0)


def test_an_interrupted_write_leaves_no_shard(store, monkeypatch):
    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        store.put(TRUTH, 1, {"x": np.zeros(1)}, examples=1)
    monkeypatch.undo()
    again = Store.build(store.directory, SETTINGS, {})
    assert again.numbers(TRUTH) == [0]
    assert not list(store.directory.rglob("*.tmp"))


def test_a_shard_has_every_column_and_no_other():
    with pytest.raises(AssertionError):
        shard_arrays(CAPTURE_COLUMNS, {"reason": np.zeros(1)}, vocabulary=10)


@pytest.mark.parametrize(("vocabulary", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.int32)])
def test_token_ids_take_the_smallest_type_of_their_vocabulary(vocabulary, dtype):
    arrays = shard_arrays(CAPTURE_COLUMNS, {name: np.zeros(1) for name in CAPTURE_COLUMNS}, vocabulary, top_k=300)
    assert (arrays["ids"].dtype, arrays["range_counts"].dtype) == (dtype, np.int32)


def test_the_command_says_what_a_store_holds_and_finds_damage(store, capsys):
    store_command(["info", str(store.directory)])
    out = capsys.readouterr().out
    assert "complete" in out
    assert "answers: transformers" in out
    assert [line.split()[:4] for line in out.splitlines() if line.startswith("truth")] == [["truth", "train", "1", "5"]]
    store_command(["verify", str(store.directory)])
    assert "all 6 files are what was written" in capsys.readouterr().out
    (store.directory / f"{TEXTS.shard(0)}.json").write_text("[]")
    with pytest.raises(DataError, match=r"1 of 6 files .*responses/train-a-00000"):
        store_command(["verify", str(store.directory)])
    store.drop_damaged()
    with pytest.raises(DataError, match="is not complete, all 3 files that it has are what was written"):
        store_command(["verify", str(store.directory)])


@pytest.mark.parametrize(
    ("of_a", "of_b", "said"),
    [
        ({}, {}, "transformers"),
        ({"engine": "vllm"}, {"engine": "vllm"}, "vllm"),
        ({}, {"engine": "continuous"}, "a by transformers, b by continuous"),
        ({"responses": "digest"}, {"engine": "server", "served": "qwen"}, "a by a file, as far as it goes, b by qwen"),
    ],
)
def test_a_store_says_what_has_answered_for_its_sources(of_a, of_b, said):
    assert answered_by({"a": {"model": "x"} | of_a, "b": {"model": "y"} | of_b}) == said


def test_set_aside_renames_and_never_overwrites(tmp_path):
    for _ in range(3):
        (tmp_path / "run").mkdir()
        set_aside(tmp_path / "run")
    assert len(list(tmp_path.iterdir())) == 3
    assert set_aside(tmp_path / "absent") is None


def test_ragged_gives_offsets_and_values():
    offsets, values = ragged([np.array([1, 2]), np.array([]), np.array([3])], np.int32)
    assert offsets.tolist() == [0, 2, 2, 3]
    assert values.tolist() == [1, 2, 3]
    assert ragged([], np.int32)[0].tolist() == [0]


def test_every_entry_knows_its_part_and_its_place_there():
    part, slot = slots_of(np.array([7, 9, 9, 12]))
    assert part.tolist() == [0, 0, 2, 2, 2]
    assert slot.tolist() == [0, 1, 0, 1, 2]
