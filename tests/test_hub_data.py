"""Data sets on the Hub: with data.limit no more of them is read than that takes, and the rows are those of the downloaded files."""

from __future__ import annotations

import bz2
import gzip
import json
import time
from pathlib import Path

import huggingface_hub
import pyarrow
import pyarrow.csv
import pyarrow.ipc
import pyarrow.parquet
import pytest
from fsspec.spec import AbstractBufferedFile
from hub_server import Hub, serving

from profuser.errors import DataError
from profuser.prepare.data import Examples, data_hash, load_examples
from profuser.prepare.data_sets import read_tables
from profuser.prepare.tables import READERS, is_read_in_parts
from profuser.recipe.data import DataConfig, DataLocation, Split

ROWS = 40
BLOCK = 4096
"""How many bytes of a file are fetched at a time, beside those that are asked for; it is 5 MiB otherwise."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(AbstractBufferedFile, "DEFAULT_BLOCK_SIZE", BLOCK)
    with serving(tmp_path / "hub", monkeypatch) as hub:
        yield hub


def rows_of(name: str, count: int = ROWS) -> list[dict[str, str]]:
    """Rows of which a table with one type per column would change some."""
    odd = ["007", "1e5", "NA", "2024-03-01", "true"]
    return [{"prompt": f"{name} {n} " + "word " * 20, "response": odd[n % len(odd)]} for n in range(count)]


def write(path: Path, rows: list[dict]) -> None:
    """Writes rows in the form that the file's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    suffix = next(suffix for suffix in path.suffixes if suffix in READERS)
    if suffix == ".parquet":
        table = pyarrow.Table.from_pylist(rows)
        pyarrow.parquet.write_table(table, path, row_group_size=500, compression="none")
    elif suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=500)
    elif suffix == ".csv":
        pyarrow.csv.write_csv(pyarrow.Table.from_pylist(rows), path)
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = path.read_bytes()
    packed = {".gz": gzip.compress, ".bz2": bz2.compress}
    path.write_bytes(packed[path.suffix](content) if path.suffix in packed else content)


def data_set(hub: Hub, ending: str, *, readme: bool = False) -> Path:
    """Makes org/set: two files of a split `train` and one of `test`, which a README names, or which are found by their names."""
    folder, names = hub.directory / "org" / "set", ["train-00000", "train-00001", "test-00000"]
    for name in names:
        write(folder / "data" / f"{name}{ending}", rows_of(name))
    if readme:
        (folder / "README.md").write_text(
            "---\nconfigs:\n- config_name: main\n  data_files:\n"
            "  - { split: first, path: 'data/train-00000*' }\n  - { split: rest, path: 'data/train-00001*' }\n---\n# A set\n"
        )
    return folder


def examples(
    limit: int | None, place: str | Path = "org/set", split: Split = "train", of: str | None = None, **config
) -> Examples:
    """Reads as a recipe with this limit reads the split `of` of a data set. Only the training split obeys it."""
    location = DataLocation(path=str(place), split=of)
    return load_examples(
        DataConfig(train="x", limit=limit, **config), location, limit if split == "train" else None, split
    )


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".csv.bz2"])
def test_rows_that_are_read_on_the_hub_are_those_of_the_files(hub, ending):
    folder = data_set(hub, ending)
    streamed, limited = examples(10**6), examples(ROWS + 3)
    assert streamed.notes == [
        "data org/set: read on the Hub, only as far as rows are needed, and not kept here (data.limit)"
    ]
    assert not [*hub.directory.glob(f"cache/**/*{ending}")]
    downloaded = examples(None)
    assert not downloaded.notes
    assert len([*hub.directory.glob(f"cache/**/*{ending}")]) == 3
    local = examples(None, folder)
    assert [*streamed] == [*downloaded] == [*local]
    assert data_hash(streamed) == data_hash(downloaded) == data_hash(local)
    assert [*limited] == [*local][: ROWS + 3]
    assert [row["response"] for row in local][:5] == ["007", "1e5", "NA", "2024-03-01", "true"]


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet", ".arrow"])
def test_no_more_is_read_than_the_limit_takes(hub, ending):
    folder = data_set(hub, ending)
    write(folder / "data" / f"train-00000{ending}", rows_of("train-00000", 5000))
    whole = (folder / "data" / f"train-00000{ending}").stat().st_size
    assert [*examples(1)] == [*examples(1, folder)]
    assert list(hub.sent) == [f"data/train-00000{ending}"]
    assert hub.sent[f"data/train-00000{ending}"] < 0.5 * whole


def test_a_split_without_a_limit_is_downloaded_alone_and_kept(hub, monkeypatch):
    folder = data_set(hub, ".jsonl")
    (folder / "README.md").write_text("# A set\n")
    heldout = examples(5, split="heldout", of="test")
    assert [*heldout] == [*examples(None, folder, "heldout", "test")]
    assert not heldout.notes
    assert set(hub.sent) == {"README.md", "data/test-00000.jsonl"}
    hub.sent.clear()
    assert [*examples(5, split="heldout", of="test")] == [*heldout]
    assert not hub.sent
    # Without a network it is the only split that is known. It is not taken for the one that is missing.
    huggingface_hub.HfFileSystem.clear_instance_cache()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert [*examples(5, split="heldout", of="test")] == [*heldout]
    for of in (None, "train"):
        with pytest.raises(
            DataError, match=r"data\.train must be on this machine where the Hub cannot be reached, [^\n]* test, got"
        ):
            examples(5, of=of)


def test_the_configuration_and_the_split_of_a_readme_are_obeyed(hub):
    folder = data_set(hub, ".jsonl", readme=True)
    for of in ("first", "rest"):
        assert [*examples(7, of=of)] == [*examples(None, folder, of=of)][:7]
    assert {name for name in hub.sent if name != "README.md"} == {"data/train-00000.jsonl", "data/train-00001.jsonl"}
    with pytest.raises(DataError, match=r"one of the splits of org/set \(first, rest\), got none"):
        examples(7)


def test_what_has_been_downloaded_is_read_from_there(hub):
    data_set(hub, ".jsonl")
    downloaded = examples(None)
    hub.sent.clear()
    kept = examples(3)
    assert [*kept] == [*downloaded][:3]
    assert not kept.notes
    assert not hub.sent


def test_a_data_set_of_which_all_is_needed_is_downloaded(hub):
    data_set(hub, ".jsonl")
    assert not examples(3, heldout_share=0.1).notes
    assert len(hub.sent) == 3


@pytest.mark.parametrize("ending", [".json", ".parquet.gz"])
def test_a_file_that_is_read_as_a_whole_is_downloaded_and_this_is_said(hub, ending):
    assert not is_read_in_parts(f"a{ending}")
    folder = data_set(hub, ending, readme=ending != ".json")
    of = "first" if ending != ".json" else None
    found = examples(3, of=of)
    assert found.notes == [
        f"data org/set: downloaded as a whole, because org/set/data/train-00000{ending} cannot be read a part at a time"
    ]
    assert [*found] == [*examples(None, folder, of=of)][:3]
    assert [*hub.directory.glob(f"cache/**/*{ending}")]


def test_an_error_names_the_file_on_the_hub_and_its_row(hub):
    folder = data_set(hub, ".jsonl")
    write(folder / "data" / "train-00001.jsonl", [*rows_of("a")[:2], {"prompt": "What?", "response": ["a"]}])
    with pytest.raises(DataError, match=r"^data org/set/data/train-00001\.jsonl, row 2 \(from 0\): [^\n]*$"):
        examples(10**6)
    assert len(examples(ROWS + 2)) == ROWS + 2


def test_a_file_that_goes_away_is_one_line(hub):
    folder = data_set(hub, ".jsonl")
    ((_, first), (_, second)) = read_tables(DataLocation(path="org/set"), "train", streams=True, say=lambda line: None)
    assert len([*first]) == ROWS
    (folder / "data" / "train-00001.jsonl").unlink()
    with pytest.raises(DataError, match=r"^data org/set/data/train-00001\.jsonl cannot be read on the Hub \([^\n]*$"):
        next(second)


@pytest.mark.parametrize("limit", [10**6, None])
@pytest.mark.parametrize(("fault", "cause"), [("busy", "429 Too Many Requests"), ("cut", "peer closed connection")])
def test_a_hub_that_does_not_answer_is_one_line_in_half_a_minute(hub, monkeypatch, fault, cause, limit):
    data_set(hub, ".jsonl")
    hub.fault, waited = fault, list[float]()
    monkeypatch.setattr(time, "sleep", waited.append)
    what, fix = ("cannot be downloaded", "what was downloaded is kept")
    if limit is not None:
        what, fix = "cannot be read on the Hub", "or leave data.limit out to download it"
    with pytest.raises(DataError, match=rf"^data org/set[^ ]* {what} \([^\n]*{cause}[^\n]*; run again [^\n]*{fix}$"):
        examples(limit)
    assert sum(waited) < 30
    hub.fault = None
    assert len(examples(limit)) == 2 * ROWS


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".jsonl.gz", ".parquet"])
def test_a_file_of_which_the_end_does_not_come_is_an_error(hub, ending):
    data_set(hub, ending)
    hub.fault = "short"
    with pytest.raises(
        DataError, match=r"train-00000[^ ]* cannot be read on the Hub \(nothing came from byte \d+ on, of \d+\)"
    ):
        examples(10**6)


@pytest.mark.parametrize("limit", [3, None])
def test_a_file_of_another_kind_is_not_left_out_unnoticed(hub, limit):
    folder = data_set(hub, ".jsonl")
    examples(limit)
    write(folder / "train-more.csv", rows_of("more", 5))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    with pytest.raises(
        DataError, match=r"data org/set: every data file of a data set [^\n]*, train-more\.csv would not be read"
    ):
        examples(limit)


def test_what_is_wrong_in_a_file_is_not_mended_by_downloading_it(hub):
    folder = data_set(hub, ".jsonl")
    (folder / "data" / "train-00000.jsonl").write_text('{"prompt": 1\n')
    with pytest.raises(
        DataError, match=r"train-00000\.jsonl cannot be read \(line 1: [^\n]*\); name a copy that is mended$"
    ):
        examples(3)


def test_an_ending_in_capitals_is_named(hub):
    (hub.directory / "org/set/data").mkdir(parents=True)
    (hub.directory / "org/set/data/train.JSONL").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(
        DataError, match=r"\); download data/train\.JSONL, whose ending is not in small letters, and name"
    ):
        examples(3)


@pytest.mark.parametrize("deleted", ["file", "link"])
def test_without_a_network_a_file_that_was_deleted_is_missed(hub, monkeypatch, deleted):
    """The rows of the others would be taken for all."""
    folder = hub.directory / "org" / "set"
    for n in range(3):
        write(folder / f"train-0000{n}-of-00003.jsonl", rows_of(str(n)))
    (folder / "README.md").write_text("# A set\n")
    assert len(examples(None)) == 3 * ROWS
    huggingface_hub.HfFileSystem.clear_instance_cache()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert len(examples(None)) == 3 * ROWS
    (link,) = hub.directory.glob("cache/**/train-00001-of-00003.jsonl")
    (link if deleted == "link" else link.resolve()).unlink()
    for limit in (None, 2):
        with pytest.raises(DataError, match=r"must be whole [^\n]*, train-00001-of-00003\.jsonl is missing; run once"):
            examples(limit)


@pytest.mark.parametrize("has_readme", [False, True])
def test_without_a_network_nothing_is_left_of_what_was_read(hub, monkeypatch, has_readme):
    folder = data_set(hub, ".jsonl")
    if has_readme:  # which is kept
        (folder / "README.md").write_text("# A set\n")
    examples(3)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        DataError, match=r"run once where the Hub can be reached, without data\.limit, so that it is kept"
    ):
        examples(3)
