"""Parquet files whose rows are written some at a time."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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
