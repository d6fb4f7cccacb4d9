"""Whatever stands in a JSON file that is read, under a right seal and digest: it is used, or refused in one line; no traceback.

Every case takes a real file, puts something else in the place of one of its values, or takes it out, and reads the file as a
command does. The digests are made right first, because they alone would refuse it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from command_runs import without_pictures
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from report_runs import make_run, record_summary
from test_checkpoint import saved, trained
from test_store import SETTINGS, TEXTS, TRUTH

from profuser.errors import DataError, ProfuserError
from profuser.evaluate.terminal import closing_examples, score_table, worse_line
from profuser.models.load import chat_format, check_vocabulary, open_model
from profuser.prepare.responses import read_responses
from profuser.prepare.summary import no_signal_warning
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.report.comparison import compare_runs
from profuser.report.metrics import read_metrics
from profuser.report.page import write_report
from profuser.store import lease
from profuser.store.__main__ import info
from profuser.store.files import write_json
from profuser.store.sealed import sealed
from profuser.store.store import Store
from profuser.train.checkpoint import load_newest
from profuser.train.run_record import EVALUATION, SCORES, read_measured, read_run, record_files
from profuser.typed import DEEPEST, parsed, read_json

leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**400, -(10**400), 1e308, math.nan, math.inf, -math.inf]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "\ud800", "\x1b[2J", "../x", "9" * 400, "complete", "mean", "skip"]),
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)

Path_ = tuple[Any, ...]


def places_in(value: Any, here: Path_ = ()) -> Iterator[Path_]:
    """The paths of all values in a JSON value. Of a long list, only the first values count."""
    yield here
    if isinstance(value, dict):
        for key in value:
            yield from places_in(value[key], (*here, key))
    elif isinstance(value, list):
        for n in range(min(len(value), 3)):
            yield from places_in(value[n], (*here, n))


@st.composite
def changed(draw: Callable, original: Any) -> Any:
    """A copy of a JSON value in which something else stands in one place, or nothing."""
    value = json.loads(json.dumps(original))
    path = draw(st.sampled_from(list(places_in(value))))
    if not path:
        return draw(values)
    inside = value
    for key in path[:-1]:
        inside = inside[key]
    if draw(st.integers(0, 5)) == 0:
        del inside[path[-1]]
    elif isinstance(inside, dict) and draw(st.integers(0, 9)) == 0:
        inside[draw(st.text(max_size=4))] = inside.pop(path[-1])
    else:
        inside[path[-1]] = draw(values)
    return value


def refused_in_one_line(use: Callable[[], Any]) -> bool:
    """Whether a use is refused. It raises whatever is not an error of ours with one line."""
    try:
        use()
    except ProfuserError as error:
        said = str(error)
    else:
        return False
    assert "\n" not in said
    return True


def fuzz(original: Any, use: Callable[[Any], Any], count: int) -> None:
    """Uses `count` changed copies of a JSON value, of which some must be refused."""
    refused = []

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(changed(original))
    def one(value: Any) -> None:
        refused.append(refused_in_one_line(lambda: use(value)))

    one()
    assert any(refused)


def seal(path: Path, value: Any) -> None:
    """Writes a file with a right seal, if it is what can have one."""
    if isinstance(value, dict):
        path.write_text(json.dumps(sealed(value)))
    else:
        path.write_text(json.dumps(value))


# Every file has a function that returns its content and how it is used, in a folder of the test's own.


def run_record(root: Path):
    run_dir, _ = make_run(root)

    def use(value):
        seal(run_dir / "run.json", value)
        read_run(run_dir)

    return read_run(run_dir), use


def put(run_dir: Path, name: str, value) -> None:
    """Gives a file of a run another content, under a right seal and digest."""
    if name == "run.json":
        seal(run_dir / name, value)
    else:
        (run_dir / name).write_text(json.dumps(value))
        record_files(run_dir, name)


def content_of(run_dir: Path, name: str):
    return read_run(run_dir) if name == "run.json" else json.loads((run_dir / name).read_text())


def report_of(name: str):
    """The report over a changed file of the run or the store."""

    def make(root: Path):
        run_dir, store_dir = make_run(root)

        def use(value):
            if name == "summary.json":
                (store_dir / name).write_text(json.dumps(value))
                record_summary(store_dir)
            else:
                put(run_dir, name, value)
            with without_pictures():
                write_report(run_dir, store_dir)

        return content_of(store_dir if name == "summary.json" else run_dir, name), use

    return make


def comparison_of(name: str):
    """The comparison of a run with one of which a file is changed."""

    def make(root: Path):
        (whole, _), (run_dir, _) = make_run(root / "whole"), make_run(root / "changed")

        def use(value):
            put(run_dir, name, value)
            with without_pictures():
                compare_runs([whole, run_dir])

        return content_of(run_dir, name), use

    return make


def measured(name: str):
    def make(root: Path):
        run_dir, _ = make_run(root)
        show = {
            SCORES: lambda content: score_table(content) + worse_line(content),
            EVALUATION: lambda content: closing_examples(content, 3),
        }[name]

        def use(value):
            put(run_dir, name, value)
            show(read_measured(run_dir, read_run(run_dir), name)).encode()

        return json.loads((run_dir / name).read_text()), use

    return make


def metrics_line(root: Path):
    run_dir, _ = make_run(root)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    def use(value):
        line = sealed(value) if isinstance(value, dict) else value
        if read_metrics(json.dumps(line).encode()).unreadable:
            raise DataError("a line that is left out and counted")

    return {k: v for k, v in (lines[0] | {"eval": lines[-1]["eval"]}).items() if k != "sha256"}, use


def state(root: Path):
    model, optimizer = trained()
    path = saved(root, 1, model, optimizer) / "state.json"

    def use(value):
        seal(path, value)
        if load_newest(root, model, optimizer) is None:
            raise DataError("passed over")

    return {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}, use


def small_store(root: Path) -> Store:
    store = Store.build(root / "store", SETTINGS, {})
    store.put(TRUTH, 0, {"x": np.arange(5, dtype=np.float16)}, examples=5)
    store.put_json(TEXTS, 0, [[["hé", True, 0]]], examples=5)
    summary = json.loads((make_run(root / "made")[1] / "summary.json").read_text())
    store.put_finding("summary.json", json.dumps(summary).encode())
    store.finish({"judge": 1.5})
    return store


def manifest(root: Path):
    directory = small_store(root).directory
    path = directory / "manifest.json"

    def use(value):
        seal(path, value)
        store = Store.open(directory, complete=False)
        info(store).encode()
        store.date, store.totals(), store.damaged(), store.damaged_findings()
        refused_in_one_line(lambda: store.changes(SETTINGS).check(directory))
        refused_in_one_line(store.handled)

    return {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}, use


def summary(root: Path):
    store = small_store(root)

    def use(value):
        store.put_finding("summary.json", json.dumps(value).encode())
        store.handled().encode()
        no_signal_warning(store.summary).encode()

    return store.summary, use


def responses(root: Path):
    store = small_store(root)

    def use(value):
        store._put(TEXTS.shard(0), json.dumps(value).encode(), {"examples": 5})
        for answers in read_responses(store, "train", "a", 0):
            [answer.left_out for answer in answers]

    return [[["hé", True, 0], ["", False, 0]], [["x", True, 1]]], use


def shard_record(root: Path):
    store = small_store(root)
    store.put_json(TEXTS, 1, [], examples=5)
    path = store.directory / "records" / "responses-train-a-00001.json"

    def use(value):
        seal(path, value)
        opened = Store.open(store.directory)
        opened.totals(), opened.damaged()
        if opened.numbers(TEXTS) != [0, 1]:
            raise DataError("nothing is recorded, so that the shard is made again")

    return {k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}, use


def lease_file(root: Path):
    path = root / "lease.json"
    original = dataclasses.asdict(
        lease.Holder("host", "boot", 2, 1, "2026-01-31T10:00:00", "works", "summary", {"a": 1})
    )

    def use(value):
        path.write_text(json.dumps(value))
        with mock.patch.object(lease, "READ_AGAIN_SECONDS", 0):
            holder = lease._read(path)
        if holder is None:
            raise DataError("it is no lease")
        str(holder).encode()

    return original, use


def model_file(name: str):
    def make(root: Path):
        shutil.copytree(resolve("demo:guardian"), root / "model")
        source, path = SourceConfig(name="guardian", model=str(root / "model")), root / "model" / name

        def use(value):
            path.write_text(json.dumps(value))
            config, chat = open_model(source), chat_format(source)
            if (rows := getattr(config.get_text_config(), "vocab_size", None)) is not None:
                check_vocabulary("guardian", chat, rows)
            chat.encode("hello", "Answer: 3")

        return json.loads(path.read_text()), use

    return make


CHEAP = {
    "run.json": run_record,
    "scores.json": measured(SCORES),
    "evaluation.json": measured(EVALUATION),
    "metrics.jsonl": metrics_line,
    "state.json": state,
    "manifest.json": manifest,
    "summary.json": summary,
    "responses/*.json": responses,
    "records/*.json": shard_record,
    ".leases/*.json": lease_file,
}
DEAR = {
    **{
        f"{name} in the report": report_of(name)
        for name in ("run.json", "scores.json", "evaluation.json", "summary.json")
    },
    **{f"{name} in a comparison": comparison_of(name) for name in ("run.json", "scores.json", "evaluation.json")},
    **{
        f"{name} of a model": model_file(name)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
    },
}


@pytest.mark.parametrize("name", CHEAP)
def test_nothing_in_our_own_json_ends_in_a_traceback(tmp_path, name):
    fuzz(*CHEAP[name](tmp_path), 60)


@pytest.mark.parametrize("name", DEAR)
def test_nothing_in_the_json_of_reports_and_models_ends_in_a_traceback(tmp_path, name):
    fuzz(*DEAR[name](tmp_path), 8)


@pytest.mark.long
@pytest.mark.parametrize("name", CHEAP)
def test_nothing_in_our_own_json_ends_in_a_traceback_whole(tmp_path, name):
    fuzz(*CHEAP[name](tmp_path), 1000)


@pytest.mark.long
@pytest.mark.parametrize("name", DEAR)
def test_nothing_in_the_json_of_reports_and_models_ends_in_a_traceback_whole(tmp_path, name):
    fuzz(*DEAR[name](tmp_path), 250)


@given(st.binary(max_size=40))
@settings(max_examples=200, deadline=None, database=None, derandomize=True)
def test_bytes_that_are_no_json_are_a_value_error(content):
    said = "JSON, got "
    try:
        parsed(content)
    except ValueError as error:
        said = str(error)
    assert said.startswith("JSON, got ")


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "\ufeff{}", "1" * 5000, ""]
)
def test_json_that_is_too_deep_or_odd_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "x.json").write_text(content, encoding="utf-8")
    assert refused_in_one_line(lambda: read_json(tmp_path / "x.json"))


def test_a_file_that_is_not_utf8_or_a_directory_is_refused_in_one_line(tmp_path):
    (tmp_path / "x.json").write_bytes('{"a": "é"}'.encode("latin-1"))
    (tmp_path / "d.json").mkdir()
    for name in ("x.json", "d.json", "none.json"):
        assert refused_in_one_line(lambda name=name: read_json(tmp_path / name))
    write_json(tmp_path / "y.json", {"a": "é"})
    assert read_json(tmp_path / "y.json", {"a": str}) == {"a": "é"}


@pytest.mark.parametrize("ends", [-1, [2, -5], "2", 2.0, True, [None], 2**31, 10**30])
def test_an_end_of_turn_that_is_no_id_is_refused(tmp_path, ends):
    _, use = model_file("generation_config.json")(tmp_path)
    with pytest.raises(DataError, match=r"generation_config\.json must hold .*the id of a token .*eos_token_id"):
        use({"eos_token_id": ends})


def test_an_id_that_no_tokenizer_has_is_refused_before_it_takes_the_memory(tmp_path):
    original, use = model_file("tokenizer.json")(tmp_path)
    token = next(iter(original["model"]["vocab"]))
    original["model"]["vocab"][token] = 2**31
    with pytest.raises(DataError, match="ids of a tokenizer must be below"):
        use(original)


def test_a_special_token_that_the_vocabulary_lacks_is_no_token(tmp_path):
    original, use = model_file("tokenizer_config.json")(tmp_path)
    use(original | {"bos_token": "zzz"})
