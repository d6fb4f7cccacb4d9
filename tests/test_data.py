"""Data files: every value is read as it stands in the file, whatever the other values of its column are."""

import json

import pytest

from profuser.errors import DataError
from profuser.prepare.data import load_examples
from profuser.recipe.places import is_path
from profuser.recipe.schema import DataConfig

TEXTS = ["007", "1.50", "1e5", "NA", "2024-03-01", "true", "a\u2028b"]


def responses(path) -> list[str]:
    return [row["response"] for row in load_examples(DataConfig(train=str(path)), str(path))]


def test_texts_that_look_like_something_else_stay_texts(tmp_path):
    rows = [{"prompt": "p", "response": text} for text in TEXTS]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.csv").write_text("prompt,response\n" + "".join(f'p,"{text}"\n' for text in TEXTS))
    for suffix in ("jsonl", "json", "csv"):
        assert responses(tmp_path / f"a.{suffix}") == TEXTS, suffix


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


def test_parquet_keeps_texts_and_refuses_bytes(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for name, values in (("texts", TEXTS), ("bytes", [b"a", b"\xff"])):
        table = pyarrow.table({"prompt": ["p"] * len(values), "response": values})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    assert responses(tmp_path / "texts.parquet") == TEXTS
    with pytest.raises(DataError, match="holds a bytes"):
        responses(tmp_path / "bytes.parquet")


def test_a_column_twice_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response,response\np,a,b\n")
    with pytest.raises(DataError, match="twice"):
        responses(tmp_path / "a.csv")
