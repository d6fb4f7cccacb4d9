"""What DistillKit has packed is unpacked as DistillKit does it, and found again for the rows of the data by its tokens alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command_runs import run
from test_given_logprobs import captured

from profuser.errors import DataError
from profuser.models.load import chat_format
from profuser.prepare.distillkit import Counts, Prefixes, Wanted, written_row
from profuser.prepare.distillkit_files import CONFIG, Compression
from profuser.prepare.given_logprobs import GivenLogprobs
from profuser.prepare.inputs import Inputs
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.text.conversation import Conversation, Turn
from profuser.text.encoded import Encoded
from profuser.text.fit import Fitted, Verdict

K = 10
EXACT = {"d": 448, "k": K, "exact_k": K, "residual_bins": [], "delta_encoding": False}
SCHOLAR = chat_format(SourceConfig(name="scholar", model="demo:scholar"))


def read(folder: Path, content: dict[str, Any]) -> Compression:
    (folder / CONFIG).write_text(yaml.safe_dump(content))
    return Compression.read(folder / CONFIG)


def packed_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Packs (n, count) integers, the highest bit first: as text, so that nothing is shared with what reads it."""
    rows = ["".join(f"{int(x):0{bits}b}" for x in row) for row in numbers]
    padded = [row + "0" * (-len(row) % 8) for row in rows]
    return np.array([[int(row[i : i + 8], 2) for i in range(0, len(row), 8)] for row in padded], np.uint8)


# What DistillKit's LogprobCompressor (commit a61c2e7) made of random distributions, and what it made of that again.
THEIRS = {
    "a curve, bins of 5 bits and of 1": (
        {
            "d": 1152, "k": 20, "exact_k": 4, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, "sqrt"], "delta_encoding": False,
            "normalize_t": True, "residual_bins": [
                {"scale_dtype": "float16", "element_bits": 5, "num_elements": 9},
                {"scale_dtype": "float32", "element_bits": 1, "num_elements": 3}],
        },
        "c4bff3bf09c00ac0d1f13dc0fe7415c1941a51405d3855401e24a8937dc7f170807c3b3e00",
        "18c788301045e41ea2da088e048dfd9f750885c862d0188ee87b0a70",
        [-1.53125, -1.89844, -2.14062, -2.15625, -2.88732, -2.94148, -3.05155, -3.10269, -3.32933, -3.77895,
         -3.83327, -4.32351, -4.61963, -4.99831, -5.20555, -5.39058, -5.36985, -5.50789, -5.62148, -5.71013],
        [198, 482, 96, 260, 754, 122, 1115, 520, 1136, 291, 1019, 503, 644, 535, 268, 720, 196, 954, 246, 167],
    ),
    "differences, a curve in bfloat16": (
        {
            "d": 448, "k": 16, "exact_k": 1, "exact_dtype": "float16", "polynomial_terms": [0, 1, "exp"], "term_dtype": "bfloat16",
            "residual_bins": [{"scale_dtype": "float16", "element_bits": 8, "num_elements": 15}], "normalize_t": True,
        },
        "66b072403141b4c0422300cca8a9a295837063676c7081869f",
        "4ad8967052852df81c43b565c131fcda86c7",
        [-0.13745, -3.79492, -4.17969, -4.75391, -5.03125, -5.08203, -5.125, -5.21094,
         -5.375, -5.62891, -5.82812, -5.92188, -5.99219, -5.94922, -6.01953, -6.04688],
        [149, 354, 179, 261, 80, 331, 252, 28, 135, 213, 302, 19, 63, 310, 323, 199],
    ),
}  # fmt: skip


class TestUnpacking:
    @pytest.mark.parametrize("name", THEIRS)
    def test_it_is_what_distillkit_unpacks(self, tmp_path, name):
        config, logprobs, tokens, values, ids = THEIRS[name]
        found = read(tmp_path, config)
        packed = [np.frombuffer(bytes.fromhex(text), np.uint8)[None] for text in (logprobs, tokens)]
        assert found.widths == tuple(x.shape[1] for x in packed)
        assert found.tokens(packed[1])[0].tolist() == ids
        # It rounds what it has added up to the type of the exact values, and we do not.
        np.testing.assert_allclose(found.logprobs(packed[0])[0], values, atol=3e-3)

    def test_exact_values_are_exact(self, tmp_path):
        values = np.log(np.random.default_rng(0).dirichlet(np.ones(K), 3)).astype(np.float32)
        assert (read(tmp_path, EXACT).logprobs(values.view(np.uint8)) == values).all()

    def test_bins_alone(self, tmp_path):
        of_bin = {"scale_dtype": "float32", "element_bits": 12, "num_elements": 5}
        found = read(tmp_path, {"d": 9, "k": 5, "exact_k": 0, "residual_bins": [of_bin]})
        numbers, scale = np.array([[2047, 2000, 1000, 2048, 0]]), np.array([[0.5]], np.float32)
        packed = np.concatenate([scale.view(np.uint8), packed_bits(numbers, 12)], axis=1)
        assert found.logprobs(packed).tolist() == [[-0.5, -24.5, -548.5, -548.5, -1572.5]]

    @pytest.mark.parametrize(("d", "bits"), [(2, 1), (256, 8), (257, 9), (49152, 16), (131072, 17), (131073, 18)])
    def test_a_token_has_the_bits_of_the_largest(self, tmp_path, d, bits):
        assert read(tmp_path, EXACT | {"d": d, "k": 2, "exact_k": 2}).index_bits == bits

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"k": 0}, "k"),
            ({"exact_dtype": "int8"}, "exact_dtype"),
            ({"polynomial_terms": [0, "sine"]}, "polynomial_terms"),
            ({"exact_k": K + 1}, "k together at most"),
            ({"residual_bins": [{"scale_dtype": "float16", "element_bits": 65, "num_elements": 1}]}, "element_bits"),
        ],
    )
    def test_a_wrong_configuration_is_one_line(self, tmp_path, change, says):
        with pytest.raises(DataError, match=says) as error:
            read(tmp_path, EXACT | change)
        assert "\n" not in str(error.value)


class TestPrefixes:
    def test_all_beginnings_are_found_and_nothing_else(self):
        prefixes = Prefixes()
        texts = [[5], [5, 6], [5, 6, 7, 8], [6], [0, 0], [0]]
        for ids in texts:
            prefixes.add(Wanted("", "", Encoded(ids, [], 0, 0, None, [])))
        assert [found.encoded.input_ids for found in prefixes.beginning([5, 6, 7])] == [[5], [5, 6]]
        assert [found.encoded.input_ids for found in prefixes.beginning([0, 0, 0])] == [[0], [0, 0]]
        assert not list(prefixes.beginning([7, 5, 6]))


def test_probabilities_that_come_to_more_than_1_are_scaled():
    """DistillKit stores a curve through the logarithms, which is not exact."""
    encoded = SCHOLAR.encode("Hi", "A stone.")
    count = len(encoded.input_ids)
    sequence: Any = SimpleNamespace(
        where="x",
        ids=np.array(encoded.input_ids),
        tokens=np.tile([5, 6], (count, 1)),
        logprobs=np.full((count, 2), -0.5),
    )
    compression: Any = SimpleNamespace(tokens=lambda x: x, logprobs=lambda x: x)
    row = written_row(Wanted("Hi", "A stone.", encoded), sequence, compression, SCHOLAR, 2, Counts())
    np.testing.assert_allclose(np.exp(row["top_logprobs"]).sum(1), 1)


def table_of(sequences: list[dict[str, Any]]) -> pa.Table:
    """DistillKit's schema."""
    byte_lists = pa.list_(pa.list_(pa.uint8()))
    columns = {"input_ids": pa.list_(pa.uint64()), "compressed_logprobs": byte_lists, "bytepacked_indices": byte_lists}
    columns |= {"attention_mask": pa.list_(pa.int64())} if "attention_mask" in sequences[0] else {}
    return pa.Table.from_pylist(sequences, pa.schema(list(columns.items())))


def sequence_of(encoded: Encoded, capture: Any, behind: tuple[int, ...]) -> dict[str, Any]:
    """A conversation as DistillKit would have captured it, with some tokens behind it. What nobody looks at is not sorted."""
    ids = [*encoded.input_ids, *behind]
    tokens = np.tile(np.arange(K), (len(ids) - 1, 1))
    logprobs = np.full((len(ids) - 1, K), -np.log(K), np.float32)
    for j, n in enumerate(encoded.label_positions):
        order = np.argsort(-capture.top_logprobs[j], kind="stable")
        tokens[n - 1], logprobs[n - 1] = capture.top_ids[j, order], capture.top_logprobs[j, order]
    return {
        "input_ids": ids,
        "compressed_logprobs": logprobs.view(np.uint8).tolist(),
        "bytepacked_indices": packed_bits(tokens, 9).tolist(),
    }


@pytest.fixture(scope="module")
def made(prepared, tmp_path_factory):
    """A directory with a recipe and DistillKit's folder of all its rows; and these, encoded and with scholar's captures."""
    _, small, store = prepared
    inputs, whole = Inputs.open(small), tmp_path_factory.mktemp("distillkit")
    folder = whole / "theirs"
    folder.mkdir()
    read(folder, EXACT)
    rows, sequences = [], []
    for split in inputs.rows:
        for row, found in zip(inputs.rows[split], captured(store, layout.truth(split, "scholar")), strict=True):
            assert found is not None
            encoded = SCHOLAR.encode(row["prompt"], row["response"])
            rows.append((row, encoded, found))
            sequences.append(sequence_of(encoded, found.capture, (3,) * (len(rows) % 3)))
    order = np.random.default_rng(0).permutation(len(rows)).tolist()
    for part in range(2):
        pq.write_table(table_of([sequences[i] for i in order[part::2]]), folder / f"data_{part}.parquet")
    data = {split: str(getattr(small.recipe.data, split)) for split in inputs.rows}
    recipe = {
        "sources": [
            {"name": "scholar", "model": "demo:scholar", "logprobs": "out.parquet"}, {"name": "guardian", "model": "demo:guardian"},
        ],
        "target": "guardian", "data": data, "schedule": "fusellm", "capture": {"top_k": K},
    }  # fmt: skip
    (whole / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return whole, rows


@pytest.fixture
def place(made, tmp_path, monkeypatch):
    """(DistillKit's folder, the rows), in a copy of the directory that is the working directory."""
    shutil.copytree(made[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "theirs", made[1]


ARGUMENTS = ("distillkit", "theirs", "--config", "recipe.yaml", "--source", "scholar", "--output", "out.parquet")


def check(rows: list, folder: Path) -> int:
    """Checks that what was written says what the source said, and returns how many tokens were not among the most probable."""
    given, outside = GivenLogprobs("scholar", str(folder / "out.parquet"), SCHOLAR, K), 0
    for row, encoded, expected in rows:
        whole = Fitted(row["response"], cut=False, verdict=Verdict.OK)
        found = given.scored(row["prompt"], row["response"], whole, encoded).capture
        assert found.ids.tolist() == expected.capture.ids.tolist()
        order = np.argsort(-expected.capture.top_logprobs, axis=1, kind="stable")
        top = np.take_along_axis(expected.capture.top_logprobs, order, 1)
        np.testing.assert_allclose(found.top_logprobs, top, atol=1e-3)
        assert {*found.top_ids[0].tolist()} == {*expected.capture.top_ids[0].tolist()}
        among = (expected.capture.top_ids == expected.capture.ids[:, None]).any(1)
        np.testing.assert_allclose(found.own_logprobs[among], expected.capture.own_logprobs[among], atol=1e-2)
        assert (found.own_logprobs[~among] == found.top_logprobs.min(1)[~among]).all()
        outside += int((~among).sum())
    return outside


class TestConversion:
    def test_a_file_that_logprobs_reads_says_what_the_source_said(self, place):
        folder, rows = place
        code, out, err = run("store", *ARGUMENTS)
        assert (code, err) == (0, "")
        outside = check(rows, folder.parent)
        learnt = sum(len(encoded.label_positions) for _, encoded, _ in rows)
        assert f"out.parquet: {len(rows)} of {len(rows)} rows of the data are there" in out
        assert (f"{outside:,} of {learnt:,} tokens are not among the most probable" in out) == bool(outside)
        inputs = Inputs.open(parse("recipe.yaml"))
        inputs.try_logprobs()
        assert all(inputs.scores_given(inputs.recipe.sources[0], split) for split in inputs.rows)

    def test_rows_that_distillkit_has_packed_are_taken_apart(self, place):
        folder, rows = place
        tables = [pq.read_table(file).to_pylist() for file in sorted(folder.glob("*.parquet"))]
        one: dict[str, list] = {name: [] for name in (*tables[0][0], "attention_mask")}
        for number, row in enumerate([row for table in tables for row in table], start=1):
            kept = len(row["bytepacked_indices"])  # DistillKit leaves out the tokens behind the last entry
            for name in row:
                one[name] += row[name][:kept]
            one["attention_mask"] += [number] * kept
        for file in folder.glob("*.parquet"):
            file.unlink()
        pq.write_table(table_of([one]), folder / "data_0.parquet")
        code, out, _ = run("store", *ARGUMENTS)
        # Without a token behind it the end of a conversation has been left out.
        there = [row for n, row in enumerate(rows, start=1) if n % 3]
        assert (code, f"{len(there)} of {len(rows)} rows" in out, "not there is for instance" in out) == (0, True, True)
        check(there, folder.parent)

    def test_a_conversation_is_written_with_its_messages(self, place):
        folder, _ = place
        talk = Conversation((Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "Which place has a wetab?")))
        encoded = SCHOLAR.encode(talk, "A wetab is a stone.")
        own = [encoded.input_ids[n] for n in encoded.label_positions]
        top_ids = np.array([[token, *range(K, 2 * K - 1)] for token in own])
        capture = SimpleNamespace(
            top_ids=top_ids, top_logprobs=np.log(np.full((len(own), K), 0.05) + np.eye(K)[0] * 0.5)
        )
        pq.write_table(table_of([sequence_of(encoded, capture, ())]), folder / "data_0.parquet")
        messages = [{"role": turn.role, "content": turn.text} for turn in talk.turns]
        messages.append({"role": "assistant", "content": "A wetab is a stone."})
        Path("talk.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
        content = yaml.safe_load(Path("recipe.yaml").read_text()) | {"data": {"train": "talk.jsonl"}}
        Path("recipe.yaml").write_text(yaml.safe_dump(content))
        assert run("store", *ARGUMENTS)[0] == 0
        inputs = Inputs.open(parse("recipe.yaml"))
        inputs.try_logprobs()
        assert not inputs.is_run(inputs.recipe.sources[0])

    @pytest.mark.parametrize(
        ("damage", "code", "says"),
        [
            (lambda f: (f / CONFIG).unlink(), 3, f"{CONFIG} is missing"),
            (lambda f: (f / CONFIG).write_text("{"), 3, "must hold DistillKit's compression"),
            (lambda f: read(f, EXACT | {"d": 9000}), 3, "`bytepacked_indices` must have 18 bytes for each token"),
            (lambda f: read(f, EXACT | {"exact_dtype": "float16"}), 3, "`compressed_logprobs` must have 20 bytes"),
            (lambda f: read(f, EXACT | {"k": 5, "exact_k": 5}), 2, "capture.top_k must be at most the 5"),
            (lambda f: [file.unlink() for file in f.glob("*.parquet")], 3, "it has none"),
            (lambda f: (f / "data_0.parquet").write_bytes(b"x" * 99), 3, "cannot be read as Parquet"),
            (lambda f: pq.write_table(pa.table({"input_ids": [[1]], "packed_indices": [[[1]]]}), f / "a.parquet"), 3, "older form"),
            (lambda f: replaced(f, "compressed_logprobs", 0x7F), 3, "must be numbers, 0 at most"),
            (lambda f: replaced(f, "bytepacked_indices", 0xFF), 3, "must be ids of the source's 448"),
            (lambda f: replaced(f, "input_ids", 7), 3, "none of 24 is in it"),
            (lambda f: Path("out.parquet").touch(), 2, "--output must be a new file"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_one_line_and_nothing_is_written(self, place, damage, code, says):
        damage(place[0])
        found, _, err = run("store", *ARGUMENTS)
        assert (found, err.count("\n"), says in err) == (code, 1, True), err
        assert not list(Path().glob(".out*"))
        assert not Path("out.parquet").exists() or says.startswith("--output")

    def test_another_source_is_refused(self, place):
        code, _, err = run("store", *(word.replace("scholar", "poet") for word in ARGUMENTS))
        assert (code, "--source must be one of the recipe's, scholar, guardian, got poet" in err) == (2, True)


def parse(config: str) -> Any:
    from profuser.recipe.parse import parse_run

    return parse_run("train", ["--config", config])


def replaced(folder: Path, column: str, value: int) -> None:
    """Writes a value in place of all of a column of a folder's files."""
    for file in folder.glob("*.parquet"):
        rows = pq.read_table(file).to_pylist()
        for row in rows:
            row[column] = [[value] * len(x) if isinstance(x, list) else value for x in row[column]]
        pq.write_table(table_of(rows), file)
