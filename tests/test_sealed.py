"""Records that prove themselves: what is no longer what was written is refused, however it came to be so."""

import json

import pytest

from profuser.errors import DataError
from profuser.store.sealed import (
    SEAL,
    digest_of,
    digest_of_file,
    is_intact,
    read_record,
    sealed,
    unsealed,
    write_sealed,
)

WORDS = {"what": "store", "fix": "restore it", "again": "make it again"}


def test_the_layout_of_a_record_does_not_matter(tmp_path):
    path = tmp_path / "record.json"
    write_sealed(path, {"schema": 3, "of": {"b": 1, "a": [2.5, None]}})
    record = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(record.items())), indent=7))
    assert read_record(path, {"schema": int}, 3, **WORDS) == {"schema": 3, "of": {"b": 1, "a": [2.5, None]}}


def test_a_seal_takes_the_place_of_an_earlier_one():
    record = sealed({"a": 1})
    assert sealed(record | {"a": 2}) == sealed({"a": 2})
    with pytest.raises(ValueError, match="its sha256 differs"):
        unsealed(record | {"a": 2}, {})
    assert unsealed(record, {"a": int}) == {"a": 1}


def test_a_record_with_half_a_character_is_refused_because_it_could_not_be_written_again(tmp_path):
    path = tmp_path / "record.json"
    content = {"schema": 3, "name": "\ud83d"}
    path.write_text(json.dumps(sealed(content)))
    assert SEAL in json.loads(path.read_text())
    with pytest.raises(DataError, match=r"must hold .*restore it"):
        read_record(path, {"schema": int}, 3, **WORDS)


def test_a_file_is_intact_if_it_can_be_read_and_is_what_was_recorded(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 10)
    assert digest_of_file(path) == digest_of(b"x" * 10)
    assert is_intact(path, digest_of(b"x" * 10))
    assert not is_intact(path, digest_of(b"x" * 9))
    assert not is_intact(path, None)
    assert not is_intact(tmp_path / "none", digest_of(b""))
    folder = tmp_path / "folder"
    folder.mkdir()
    assert not is_intact(folder, digest_of(b"") | {"bytes": folder.stat().st_size})
