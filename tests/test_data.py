"""Data: every value is read as it stands in the file, from a file, a folder or a data set on the Hub."""

import gzip
import json
import os
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets.config
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from profuser.errors import DataError
from profuser.prepare.data import Row, load_examples, shared_prompts
from profuser.prepare.tables import READERS, read_file
from profuser.recipe.data import DataConfig, DataLocation, Split
from profuser.recipe.places import FILE_SUFFIXES, is_path

TEXTS = [
    "007",
    "1.50",
    "1e5",
    "NA",
    "null",
    "NaN",
    "nan",
    "2024-03-01",
    "2024-03-01T10:00:00Z",
    "true",
    "True",
    "",
    "a\u2028b",
]


def examples(place, split: Split = "train", **columns) -> Sequence[Row]:
    location = place if isinstance(place, DataLocation) else DataLocation(path=str(place))
    return load_examples(DataConfig(train="unused", **columns), location, split=split)


def responses(place, split: Split = "train") -> list[str]:
    return [row["response"] for row in examples(place, split)]


def refusal(place, split: Split = "train", **columns) -> str:
    with pytest.raises(DataError) as error:
        examples(place, split, **columns)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path, *texts: str):
    """Writes a JSONL file with a row per response, which is named after the file where none is given; returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"{path.stem} {n}", "response": text} for n, text in enumerate(texts or [path.stem])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path.parent


def with_configurations(folder):
    """Makes a folder as data sets on the Hub are: with two configurations, of which one has two splits."""
    write(folder / "main" / "train.jsonl", "main train")
    write(folder / "main" / "test.jsonl", "main test")
    write(folder / "socratic" / "train.jsonl", "socratic train")
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: main\n  data_files:\n  - { split: train, path: main/train* }\n  - { split: test, path: main/test* }\n"
        "- config_name: socratic\n  data_files:\n  - { split: train, path: socratic/train* }\n---\n"
    )
    return folder


# -- values ------------------------------------------------------------------------------------------------------------


def test_files_that_other_tools_write_are_read(tmp_path):
    row = {"prompt": "007", "response": "NA"}
    table = pyarrow.table({key: [value] for key, value in row.items()})
    with (
        pyarrow.OSFile(str(tmp_path / "indexed.arrow"), "wb") as file,
        pyarrow.ipc.new_file(file, table.schema) as writer,
    ):
        writer.write_table(table)
    (tmp_path / "joined.jsonl").write_text(
        f"\ufeff{json.dumps(row)}\r\n\r\n\ufeff{json.dumps(row)}\r\n \r\n", newline=""
    )
    (tmp_path / "blank.csv").write_text("\ufeffprompt,response\r\n007,NA\r\n\r\n\r\n", newline="")
    for name, count in (("indexed.arrow", 1), ("joined.jsonl", 2), ("blank.csv", 1)):
        assert list(read_file(tmp_path / name, name)) == [row] * count, name


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n "data": [\n  {"prompt": "a"}\n ]\n}', "it is one object with the keys data"),
        ('{\n "prompt": "a",\n "response": "b"\n}', "with the keys prompt, response"),
        ('[{"prompt": "a"}, {"prompt": "b", "prompt": "c"}]', "'prompt' stands in an object twice, {'prompt': 'c'}"),
        ('{"prompt": "a"}\n{"prompt": "b",}', "(line 2: "),
        ('{"prompt": "a"}\n{"prompt": "b', "(line 2: Unterminated string starting at, at character 12)"),
    ],
)
def test_json_of_another_shape_says_what_it_is(tmp_path, content, expected):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=r"a\.json cannot be read") as error:
        list(read_file(tmp_path / "a.json", "a.json"))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_texts_that_look_like_something_else_stay_texts(tmp_path):
    rows = [{"prompt": "p", "response": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("prompt,response\n" + "".join(f'p,"{text}"\n' for text in TEXTS))
    (tmp_path / "a.tsv").write_text("prompt\tresponse\n" + "".join(f"p\t{text}\n" for text in TEXTS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        assert responses(tmp_path / f"a.{suffix}") == TEXTS, suffix


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("one.csv", "prompt,response,skill\nNA,null,007\n2024-03-01,true,1e5\n,x,NaN\n"),
        ("one.tsv", "prompt\tresponse\tskill\nNA\tnull\t007\n2024-03-01\t1,5\tFalse\n"),
        ("one.jsonl", '{"prompt": NaN, "response": true, "skill": 2.50}\n{"prompt": "2024-03-01", "response": null}\n'),
        ("train.json", '[{"prompt": 1e5, "response": "007"}, {"prompt": 12345678901234567890, "response": -Infinity}]'),
        ("one.jsonl", '{"prompt": "mixed", "response": "1"}\n{"prompt": "types", "response": 1}\n'),
    ],
)
def test_a_folder_is_read_like_the_file_in_it(tmp_path, name, content):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_text(content)
    (tmp_path / "set" / "README.md").write_text("About it.")
    assert examples(tmp_path / "set") == examples(tmp_path / "set" / name)


def test_values_of_json_are_spelt_as_in_the_file(tmp_path):
    spelt = ["-Infinity", "true", "false", "2.50", "1e5", "10000000000000000000000", "1.0", "-1.50"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"prompt": {value}, "response": {value}, "skill": {value}}}\n' for value in spelt))
    rows = examples(path)
    assert [[row[key] for row in rows] for key in ("prompt", "response", "skill")] == [spelt] * 3


def test_other_columns_keep_the_types_of_json(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "p", "response": "r", "steps": 2.50, "ok": true, "tags": ["x"]}\n')
    (row,) = examples(tmp_path / "a.jsonl")
    assert (row["steps"], row["ok"], row["tags"]) == (2.5, True, ["x"])


@pytest.mark.parametrize("name", ["a.JSONL", "a.Json", "a.CSV"])
def test_a_suffix_may_be_in_capitals(tmp_path, name):
    rows = [{"prompt": "p", "response": "007"}]
    (tmp_path / name).write_text("prompt,response\np,007\n" if name == "a.CSV" else json.dumps(rows))
    if name == "a.JSONL":
        (tmp_path / name).write_text(json.dumps(rows[0]) + "\n")
    assert responses(tmp_path / name) == ["007"]
    assert is_path(name)  # a file of this name that is missing is no data set of the Hub


def test_a_csv_cell_may_be_long_and_hold_line_ends(tmp_path):
    text = "word\n" * 40000 + "end"
    (tmp_path / "a.csv").write_text(f'\ufeffprompt,response\np,"{text}"\n')
    assert responses(tmp_path / "a.csv") == [text]


def test_a_number_is_written_as_in_the_file_and_a_missing_value_is_empty(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": 1, "response": 2}\n{"prompt": 1.0}\n\n{"prompt": "x", "response": null}\n'
    )
    found = load_examples(DataConfig(train="a"), str(tmp_path / "a.jsonl"))
    assert [(row["prompt"], row["response"]) for row in found] == [("1", "2"), ("1.0", ""), ("x", "")]


def test_parquet_refuses_bytes(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "response": [b"\xff"]}), tmp_path / "a.parquet")
    assert "got a bytes" in refusal(tmp_path / "a.parquet")


@pytest.mark.parametrize("row", ['"b,y', '"b" too,y'])
def test_a_row_of_a_csv_file_with_a_wrong_quote_is_named(tmp_path, row):
    (tmp_path / "a.csv").write_text(f"prompt,response\na,x\n{row}\nc,z\n")
    assert "row 3, counted from the header: " in refusal(tmp_path / "a.csv")


def test_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,response\np,a,b\n")
    assert "'response' stands in the header twice" in refusal(tmp_path / "a.csv")
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "p", "response": "a"}\n{"prompt": "p", "response": "a", "prompt": "q"}\n'
    )
    assert "line 2: the key 'prompt' stands in an object twice" in refusal(tmp_path / "a.jsonl")


# -- files, folders and data sets --------------------------------------------------------------------------------------


def test_a_compressed_file_is_read_like_the_file_in_it(tmp_path):
    write(tmp_path / "a.jsonl", *TEXTS)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.JSONL.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.JSONL.gz", "b.jsonl.GZ"):
        (tmp_path / "set" / "a.JSONL.gz").rename(tmp_path / name)
        assert examples(tmp_path / name) == examples(tmp_path / "a.jsonl")
        (tmp_path / name).rename(tmp_path / "set" / "a.JSONL.gz")
    (tmp_path / "set" / "a.JSONL.gz").unlink()
    write(tmp_path / "set" / "a.jsonl", "changed since")
    (tmp_path / "set" / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "set" / "a.jsonl").read_bytes()))
    (tmp_path / "set" / "a.jsonl").unlink()
    assert responses(tmp_path / "set") == ["changed since"]


def test_a_folder_that_the_library_saved_is_read_with_its_splits(tmp_path):
    saved = {name: datasets.Dataset.from_dict({"prompt": ["NA"], "response": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(**saved).save_to_disk(str(tmp_path / "set"))
    assert responses(tmp_path / "set") == ["train"]
    assert responses(DataLocation(path=str(tmp_path / "set"), split="test"), "heldout") == ["test"]


def test_a_link_to_nothing_is_named(tmp_path):
    """Of a folder or a pattern, the rows of the other files would be taken for all."""
    write(tmp_path / "set" / "b.jsonl", "text")
    (tmp_path / "set" / "a.jsonl").symlink_to("gone.jsonl")
    for place in ("set", "set/*.jsonl", "set/a.jsonl"):
        assert "a.jsonl is a link to what is not there" in refusal(tmp_path / place)
    assert responses(tmp_path / "set" / "b.jsonl") == ["text"]


@pytest.mark.parametrize("value", ["[" * 300 + "]" * 300, '{"x": ' * 300 + "1" + "}" * 300])
def test_a_value_that_is_nested_very_deep_is_named(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "p", "response": "r", "more": {value}}}\n')
    assert "row 0 (from 0) has more in the column 'more'" in refusal(tmp_path / "a.jsonl")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "a.jsonl is a pipe or a device" in refusal(tmp_path / "a.jsonl")


@pytest.mark.parametrize("lost", [0, 1])
def test_a_part_of_a_saved_folder_that_is_missing_is_named(tmp_path, lost):
    """The rows of the others would be taken for all. Whoever means these alone can name them."""
    rows = {"prompt": ["a", "b"], "response": ["x", "y"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "set"), num_shards=2)
    assert responses(tmp_path / "set") == ["x", "y"]
    (tmp_path / "set" / f"data-0000{lost}-of-00002.arrow").unlink()
    assert f"must be there, data-0000{lost}-of-00002.arrow is missing" in refusal(tmp_path / "set")
    assert responses(tmp_path / "set" / "*.arrow") == [["y"], ["x"]][lost]


def test_every_ending_that_is_read_is_known_as_that_of_a_file():
    assert set(READERS) <= FILE_SUFFIXES
    assert all(map(is_path, ("missing.JSONL", "missing.csv.gz", "missing.tsv")))


@pytest.mark.parametrize(
    ("kept", "lost"),
    [
        (["train.jsonl"], "heldout.jsonl"),  # `heldout: set` would be read from train.jsonl, without a word
        (["train.jsonl"], "more.jsonl"),
        (["part-1.jsonl", "part-2.jsonl"], "part-3.csv"),
        (["part-1.jsonl", "part-2.jsonl"], "part-3.JSONL"),
        (["data/train/a.jsonl", "data/test/a.jsonl"], "other/a.jsonl"),
    ],
)
def test_no_file_of_a_folder_is_left_out_unnoticed(tmp_path, kept, lost):
    """The library takes the files of one kind only, and leaves out those that are not called after a split where others are."""
    for name in kept:
        write(tmp_path / name)
    write(tmp_path / ".cache" / "a.jsonl")
    assert responses(tmp_path)
    write(tmp_path / lost)
    for split in ("train", "heldout"):
        said = refusal(tmp_path, split)
        assert f"{lost} would not be read (1 of {len(kept) + 1} files)" in said
    assert responses(tmp_path / kept[0])  # what the message proposes
    # A README chooses on purpose.
    chosen = {"configs": [{"config_name": "default", "data_files": kept[0]}]}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(chosen)}---\n")
    assert len(responses(tmp_path)) == 1


def test_a_folder_whose_name_is_a_pattern_is_refused_and_its_files_are_read(tmp_path):
    write(tmp_path / "set [v2]" / "a.jsonl", "yes")
    assert "without [ ], got" in refusal(tmp_path / "set [v2]")
    assert responses(tmp_path / "set [v2]" / "a.jsonl") == ["yes"]


@pytest.mark.parametrize(
    ("name", "header", "said"),
    [
        ("a.csv", "prompt;response", "separated by ',', the header has only ';'"),
        ("a.csv", "prompt\tresponse", "separated by ',', the header has only '\\t'"),
        ("a.tsv", "prompt,response", "separated by '\\t', the header has only ','"),
    ],
)
def test_cells_that_something_else_separates_are_named(tmp_path, name, header, said):
    (tmp_path / name).write_text(f"{header}\n")
    assert said in refusal(tmp_path / name)


def test_a_split_has_to_be_named_where_a_score_could_be_one_on_training_rows(tmp_path):
    folder = write(tmp_path / "set" / "train.jsonl")
    write(folder / "test.jsonl")
    assert responses(folder) == ["train"]
    assert responses(DataLocation(path=str(folder), split="test"), "heldout") == ["test"]
    message = refusal(folder, "heldout")
    assert "(train, test)" in message
    assert f"set data.heldout: {{ path: {folder}, split: test }}" in message
    assert f"set data.validation: {{ path: {folder}, split: test }}" in refusal(folder, "validation")
    assert "got tset; " in refusal(DataLocation(path=str(folder), split="tset"), "heldout")


def test_a_split_is_found_without_a_name_where_there_is_one_only_or_one_of_the_same_name(tmp_path):
    only = write(tmp_path / "only" / "test.jsonl")
    assert responses(only) == responses(only, "heldout") == ["test"]
    for name in ("train", "validation", "test"):
        folder = write(tmp_path / "all" / f"{name}.jsonl")
    assert (responses(folder), responses(folder, "validation")) == (["train"], ["validation"])


def test_a_configuration_has_to_be_named_where_there_are_several(tmp_path):
    folder = with_configurations(tmp_path / "set")

    def at(**names) -> DataLocation:
        return DataLocation(path=str(folder), **names)

    assert responses(at(config="main")) == ["main train"]
    assert responses(at(config="main", split="test"), "heldout") == ["main test"]
    assert responses(at(config="socratic"), "heldout") == ["socratic train"]
    assert "(main, socratic), got none; set data.train: { path: " in refusal(at())
    assert "got socratik; set data.heldout" in refusal(at(config="socratik"), "heldout")
    assert "config: socratic }" in refusal(at(config="socratik"), "heldout")
    # The fix that is printed keeps what was said already.
    assert f"{{ path: {folder}, config: main, split: test }}" in refusal(at(config="main"), "heldout")


def test_the_location_that_an_error_prints_can_be_used_as_it_is(tmp_path):
    """Each error leads to the next until all is said. The words behind `set data.heldout:` are what a recipe takes."""
    folder = with_configurations(tmp_path / "set")
    location = DataLocation(path=str(folder))
    for said in ({"config": "main"}, {"config": "main", "split": "test"}):
        printed = refusal(location, "heldout").partition("; set data.heldout: ")[2]
        location = DataLocation(**yaml.safe_load(printed))
        assert location == DataLocation(path=str(folder), **said)
    assert responses(location, "heldout") == ["main test"]


def test_a_configuration_of_a_folder_without_any_names_the_folder_that_was_meant(tmp_path):
    write(tmp_path / "set" / "main" / "train.jsonl")
    message = refusal(DataLocation(path=str(tmp_path / "set"), config="main"))
    assert f"set path: {tmp_path}/set/main" in message
    assert "set path" not in refusal(DataLocation(path=str(tmp_path / "set"), config="other"))


def test_a_file_has_no_splits_and_no_configurations(tmp_path):
    write(tmp_path / "a.jsonl")
    assert "a file has no split, got test" in refusal(DataLocation(path=str(tmp_path / "a.jsonl"), split="test"))
    assert "a file has no config, got main" in refusal(DataLocation(path=str(tmp_path / "a.jsonl"), config="main"))


def test_a_data_set_of_the_hub_is_read_from_its_files_without_a_network(tmp_path, monkeypatch):
    """The library's own tables of an earlier run are there as well. In them "007" has become 7."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "tables"))
    folder = tmp_path / "hub" / "datasets--org--sums"
    write(folder / "snapshots" / "0" / "train.jsonl", "007", "NA")
    write(folder / "snapshots" / "0" / "test.jsonl")
    write(folder / "refs" / "main").joinpath("main").write_text("0")
    table = tmp_path / "tables" / "org___sums" / "default" / "0.0.0" / "0"
    table.mkdir(parents=True)
    builder = datasets.load_dataset_builder("json", data_files=str(folder / "snapshots" / "0" / "train.jsonl"))
    builder.info.write_to_directory(str(table))
    assert responses("org/sums") == ["007", "NA"]
    assert responses(DataLocation(path="org/sums", split="test"), "heldout") == ["test"]
    assert "(train, test), got none" in refusal("org/sums", "heldout")
    assert "run once where the Hub can be reached" in refusal("org/others")


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"sep": ";"}, ["NA"]), ({"encoding": "latin-1"}, "encoding"), ({"names": ["a"]}, "names")],
)
def test_how_a_data_set_wants_its_files_read_is_obeyed_or_refused(tmp_path, options, expected):
    config = {"config_name": "main", "data_files": "*.csv"} | options
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    (tmp_path / "a.csv").write_text("prompt;response\np;NA\n")
    if isinstance(expected, list):
        assert responses(tmp_path) == expected
    else:
        assert f"its README sets {expected}; " in refusal(tmp_path)


def test_a_folder_that_cannot_be_read_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "contain any data files" in refusal(tmp_path / "empty")
    write(tmp_path / "capitals" / "a.JSONL")
    assert "write the ending of a.JSONL in small letters, or name this file" in refusal(tmp_path / "capitals")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")
    assert f"got {tmp_path}/text/a.txt; convert it" in refusal(tmp_path / "text")
    write(tmp_path / "card" / "a.jsonl")
    (tmp_path / "card" / "README.md").write_bytes(b"caf\xe9")
    assert "its README.md is not UTF-8" in refusal(tmp_path / "card")


# -- Unicode -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b'{"prompt": "8-4=?", "response": "Answer: 4. \\ud83d"}\n', ("row 0", "'response'", r"\ud83d")),
        ("a.jsonl", b'{"prompt": "p", "response": "r"}\n\n{"prompt": "p", "skill": "\\udc00"}', ("row 1", "'skill'", r"\udc00")),
        ("a.json", b'[{"prompt": "p", "response": "r", "meta": {"tags": ["\\uDFFF"]}}]', ("row 0", "'meta'", r"\udfff")),
        ("a.jsonl", b'{"prompt": "p", "response": "r"}\n{"prompt": "caf\xe9", "response": "r"}\n', ("row 1", "'prompt'", "0xe9")),
        ("a.csv", b'prompt,response\n"two\nlines",r\ncaf\xe9,r\n', ("row 1", "'prompt'", "0xe9")),
        ("a.csv", b"prompt,response,caf\xe9\np,r,x\n", ("row 0", "0xe9")),
        ("a.csv", "prompt,response\np,é\n".encode("utf-16"), ("UTF-16", "iconv -f UTF-16")),
    ],
)  # fmt: skip
def test_a_text_that_is_not_unicode_is_named_by_file_and_row(tmp_path, name, content, expected):
    """The same holds for a file in a folder. Every column counts, because judges may read all of them."""
    for place in (tmp_path / name, tmp_path / "set" / name):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(content)
    for place in (tmp_path / name, tmp_path / "set"):
        message = refusal(place)
        assert str(place / name if place.is_dir() else place) in message
        for part in expected:
            assert part in message


def test_a_parquet_text_that_is_not_utf8_is_named_by_its_row(tmp_path):
    offsets, content = (pyarrow.py_buffer(bytes) for bytes in (b"\0\0\0\0\1\0\0\0\2\0\0\0", b"a\xe9"))
    prompts = pyarrow.StringArray.from_buffers(2, offsets, content)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts, "response": ["r", "r"]}), tmp_path / "a.parquet")
    message = refusal(tmp_path / "a.parquet")
    assert "a.parquet" in message
    assert "row 1" in message


def test_whole_characters_beyond_the_first_plane_are_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "response": "😀"}\n')
    (row,) = examples(tmp_path / "a.jsonl")
    assert row["prompt"] == row["response"] == "😀"


def test_prompts_that_are_in_both_splits_are_counted():
    training = [{"prompt": "What is 1+1?"}, {"prompt": "Who\nis it?"}]
    asked = [{"prompt": " What is  1+1?"}, {"prompt": "Who is it?"}, {"prompt": "what is 1+1?"}]
    assert shared_prompts(asked, training) == 2
    assert shared_prompts([], training) == shared_prompts(asked, []) == 0


# --- how far files are read ---------------------------------------------------------------------------------------------


def limited(path: Path, limit: int | None, **data: Any) -> Sequence[Row]:
    return load_examples(DataConfig(train=str(path), **data), str(path), limit)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".csv"])
def test_no_more_is_read_than_the_examples_that_are_asked_for(tmp_path, ending):
    rows = [{"prompt": f"Question {n}?", "response": f"Answer {n}."} for n in range(9)]
    if ending == ".csv":
        text = "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in rows) + "one cell\n"
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows) + "{broken\n"
    path = tmp_path / f"data{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    assert [row["prompt"] for row in limited(path, 4)] == [row["prompt"] for row in rows[:4]]
    assert len(limited(path, 9)) == 9
    for limit in (10, None):
        with pytest.raises(DataError, match=r"line 10: |row 11 has 1 cells"):
            limited(path, limit)


@pytest.mark.parametrize(
    "ending", [pytest.param("jsonl", marks=pytest.mark.long), "parquet", pytest.param("arrow", marks=pytest.mark.long)]
)
def test_the_examples_are_those_of_all_rows_however_far_is_read(tmp_path, ending):
    rows = [{"prompt": f"Question {n // 2}?", "response": f"Answer {n}."} for n in range(2600)]
    table, path = pyarrow.Table.from_pylist(rows), tmp_path / f"data.{ending}"
    if ending == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif ending == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=1500)
    every = limited(path, None)
    assert [row["response"] for row in every] == [row["response"] for row in rows]
    kept = limited(path, None, drop_duplicates=True)
    assert len(kept) == 1300
    for limit in (1, 700, 1299, 1300):
        assert limited(path, limit, drop_duplicates=True) == kept[:limit]
        assert limited(path, limit) == every[:limit]
    assert limited(path, 5000) == every


def test_a_file_is_not_held_in_memory(tmp_path):
    path = tmp_path / "large.jsonl"
    line = json.dumps({"prompt": "Which?", "response": "x" * 4000}) + "\n"
    path.write_text(line * 5000)  # 20 MB
    limited(path, 1)
    tracemalloc.start()
    assert len(limited(path, 3)) == 3
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_memory_hardly_grows_with_the_number_of_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "response": "x" * 10_000}) + "\n" for n in range(1000)))
    tracemalloc.start()
    rows = limited(path, None, drop_duplicates=True)
    held, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rows) == 1000
    assert held < 500_000  # the responses have ten million characters
    assert most < 2_000_000


@pytest.mark.parametrize("ending", ["arrow", "arrow.gz"])
def test_a_stream_whose_writer_was_killed_between_two_tables_is_an_error(tmp_path, ending):
    table, content = pyarrow.table({"prompt": ["a", "b"], "response": ["c", "d"]}), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(content, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
        there = content.tell()
    path = tmp_path / f"data.{ending}"
    packed = gzip.compress if ending.endswith("gz") else bytes
    path.write_bytes(packed(content.getvalue().to_pybytes()))
    assert responses(path) == ["c", "d"]
    path.write_bytes(packed(content.getvalue().to_pybytes()[:there]))
    assert "was not written to its end" in refusal(path)
    assert [row["response"] for row in limited(path, 1)] == ["c"]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_a_column_that_stands_twice_is_an_error(tmp_path, ending):
    table, path = (
        pyarrow.table([["a"], ["c"], ["b"]], names=["prompt", "prompt", "response"]),
        tmp_path / f"data.{ending}",
    )
    if ending == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match="the column 'prompt' stands in the file twice"):
        list(read_file(path, path.name))
