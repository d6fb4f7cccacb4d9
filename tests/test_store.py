import numpy as np
import pytest

from profuser.errors import ConfigError, DataError
from profuser.store import Store, ragged, set_aside

VOTES = {"asked": ["rm", "check"], "judges": {"rm": {"files": "1"}, "check": {"files": "2"}}}
SETTINGS = {"capture": {"top_k": 10, "sources": {"a": 1}}, "votes": VOTES, "targets": {"rule": 1}}


@pytest.fixture
def store(tmp_path):
    store = Store.open(tmp_path / "store", SETTINGS)
    store.put("capture/a-00000", {"x": np.arange(5, dtype=np.float16)}, examples=5)
    store.put("targets/train-00000", {"y": np.ones((2, 3), np.int32)})
    store.put_json("capture/texts-00000", [["hé", True]])
    store.finish()
    return store


def test_what_was_put_comes_back(store):
    again = Store.load(store.directory)
    assert again.get("capture/a-00000")["x"].tolist() == [0, 1, 2, 3, 4]
    assert again.get("capture/a-00000")["x"].dtype == np.float16
    assert again.get_json("capture/texts-00000") == [["hé", True]]
    assert again.names("capture/") == ["capture/a-00000", "capture/texts-00000"]


@pytest.mark.parametrize("cut", [0, 1, 20, -1])
def test_a_truncated_shard_is_refused_and_dropped_for_rebuilding(store, cut):
    path = store.directory / "capture/a-00000.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match="a-00000"):
        store.get("capture/a-00000")
    assert not store.valid("capture/a-00000")
    assert not Store(store.directory, store.manifest).complete
    with pytest.raises(DataError, match="not complete"):
        Store.load(store.directory)


def test_a_flipped_bit_is_refused(store):
    path = store.directory / "targets/train-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="sha256"):
        store.get("targets/train-00000")


def test_a_changed_text_file_is_refused(store):
    (store.directory / "capture/texts-00000.json").write_text("[]")
    with pytest.raises(DataError, match="texts-00000"):
        store.get_json("capture/texts-00000")


def test_other_capture_settings_need_another_store(store):
    with pytest.raises(ConfigError, match=r"sources\.a, top_k differ"):
        Store.open(store.directory, SETTINGS | {"capture": {"top_k": 5, "sources": {"a": 2}}})


def test_other_model_files_are_not_the_stores(tmp_path):
    with_files = [SETTINGS | {"capture": {"sources": {"a": {"files": x}}}} for x in "12"]
    Store.open(tmp_path / "s", with_files[0])
    with pytest.raises(DataError, match=r"sources\.a\.files"):
        Store.open(tmp_path / "s", with_files[1])


def test_a_changed_judge_votes_again_and_the_answers_and_the_others_scores_stay(store, capsys):
    for name in ("train-scores-rm", "train-scores-check", "train-infer-a", "train-responses-a"):
        store.put(f"capture/{name}-00000", {"x": np.ones(1)})
    changed = VOTES | {"judges": VOTES["judges"] | {"check": {"files": "3"}}}
    again = Store.open(store.directory, SETTINGS | {"votes": changed})
    assert "judges changed (check): voting again" in capsys.readouterr().out
    left = {n for n in again.names("") if "train-" in n}
    assert left == {"capture/train-scores-rm-00000", "capture/train-responses-a-00000"}
    assert not again.complete
    without = Store.open(store.directory, SETTINGS | {"votes": {"asked": [], "judges": {}}})
    assert without.names("capture/train-scores-rm")
    assert Store.open(store.directory, SETTINGS | {"votes": changed}).names("capture/train-scores-rm")


def test_another_alignment_drops_the_targets_and_keeps_the_captures(store):
    again = Store.open(store.directory, SETTINGS | {"targets": {"rule": 2}})
    assert again.names("targets/") == []
    assert again.valid("capture/a-00000")
    assert not again.complete


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match=r"manifest\.json"):
        Store.open(tmp_path, SETTINGS)


def test_another_schema_is_refused(store):
    store.manifest["schema"] = 99
    store._save()
    with pytest.raises(DataError, match="schema 99"):
        Store.open(store.directory, SETTINGS)


def test_a_broken_manifest_is_refused(store):
    (store.directory / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="JSON"):
        Store.open(store.directory, SETTINGS)


def test_no_shard_name_leaves_the_store(store):
    store.manifest["shards"]["../../evil"] = {"sha256": ""}
    with pytest.raises(DataError, match="inside"):
        store.get("../../evil")


def test_an_interrupted_write_leaves_no_shard(store, monkeypatch):
    import os

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        store.put("capture/b-00000", {"x": np.zeros(1)})
    monkeypatch.undo()
    again = Store.open(store.directory, SETTINGS)
    assert not again.valid("capture/b-00000")
    assert not list(store.directory.rglob("*.tmp"))


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
