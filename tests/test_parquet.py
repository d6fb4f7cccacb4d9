"""Parquet files whose rows are written some at a time."""

import errno

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profuser.store.files import DiskFull
from profuser.store.parquet import write_rows

SCHEMA = pa.schema({"n": pa.int64(), "text": pa.string()})


@pytest.mark.parametrize("count", [1, 4, 5])
def test_all_rows_are_written_whatever_is_held_at_a_time(tmp_path, count):
    rows = [{"n": n, "text": None if n == 0 else f"{n}"} for n in range(count)]
    assert write_rows(tmp_path / "new" / "x.parquet", iter(rows), SCHEMA, at_a_time=2) == count
    table = pq.ParquetFile(tmp_path / "new" / "x.parquet")
    assert table.read().to_pylist() == rows
    assert table.num_row_groups == -(-count // 2)


def test_without_rows_or_with_an_error_there_is_no_file(tmp_path):
    assert write_rows(tmp_path / "x.parquet", [], SCHEMA) == 0

    def rows():
        yield {"n": 1, "text": "a"}
        raise KeyError("n")

    with pytest.raises(KeyError):
        write_rows(tmp_path / "x.parquet", rows(), SCHEMA, at_a_time=1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_named_with_the_file_and_one_of_the_rows_with_its_own(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def rows():
        yield {"n": 1, "text": "a"}
        full()

    with pytest.raises(OSError, match="No space left") as error:  # as a list on another disk raises it
        write_rows(tmp_path / "x.parquet", rows(), SCHEMA, at_a_time=1)
    assert not isinstance(error.value, DiskFull)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(DiskFull, match=r"x\.parquet needs [1-9]\d* bytes, [\d,]+ are free"):
        write_rows(tmp_path / "x.parquet", [{"n": 1, "text": "a"}], SCHEMA)
    assert not list(tmp_path.iterdir())
