"""`store export` writes what the audit table holds, in the columns of preference trainers; `store diff` names what differs."""

import io
import json
import shutil
from functools import partial
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from profuser.errors import ConfigError, DataError
from profuser.prepare.inputs import Inputs
from profuser.prepare.responses import Response
from profuser.prepare.summary import audit_tables
from profuser.prepare.votes import count_votes
from profuser.store import layout
from profuser.store.__main__ import difference, main
from profuser.store.export import card, export, preferences_of, responses_of
from profuser.store.store import Store
from profuser.text.fit import Verdict


def test_an_export_is_a_data_set_with_two_tables(prepared, tmp_path, capsys, monkeypatch):
    _, run, store = prepared
    main(["export", str(store.directory), "--output", str(tmp_path / "out")])

    def loaded(name):
        # The library's own cache knows a folder by its last name alone, so that it may hold another folder of this name.
        folder, cache = str(tmp_path / "out"), str(tmp_path / "cache")
        return datasets.load_dataset(folder, name, split="train", cache_dir=cache)

    ballots = count_votes(store, run.recipe)
    monkeypatch.setattr("profuser.prepare.summary.AT_A_TIME", 3)
    tables = list(audit_tables(Inputs.open(run), store, ballots))
    table = {name: [cell for part in tables for cell in part[name]] for name in tables[0]}
    responses = loaded("responses")
    kinds = {source.name: layout.responses("train", source.name) for source in run.recipe.sources}
    written = {name: store.by_example(kind, partial(store.get_json, kind)) for name, kind in kinds.items()}
    examples, sources = len(table["prompt"]), [source.name for source in run.recipe.sources]
    assert len(responses) == examples * len(sources)
    for row in responses.to_list():
        e, name = row["example"], row["source"]
        assert row["response"] == table[f"response_{name}"][e]
        answer = Response(*written[name][e][0])
        assert (row["finished"], row["left_out"] or "") == (answer.finished, answer.left_out)
        assert row["votes"] == table[f"votes_{name}"][e]
        assert row["prompt"] == table["prompt"][e]
        for judge in run.recipe.judges:
            score = table[f"score_{judge.name}_{name}"][e]
            assert row[f"score_{judge.name}"] == score or score != score
    preferences = loaded("preferences")
    kept = [e for e in range(examples) if table["chosen"][e] and table["rejected"][e]]
    assert len(preferences) == len(kept) > 0
    for row, e in zip(preferences.to_list(), kept):
        assert [*row["prompt"], *row["chosen"]] == table["chosen"][e]
        assert [*row["prompt"], *row["rejected"]] == table["rejected"][e]
        assert [message["role"] for message in (*row["chosen"], *row["rejected"])] == ["assistant"] * 2
    assert f"{len(responses)} responses, {len(kept)} preferences" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"- {name}: `demo:{name}`" in card for name in sources)
    with pytest.raises(ConfigError, match="new or empty folder"):
        export(store, tmp_path / "out")


def test_an_export_says_which_responses_were_finished_and_which_cannot_be_used():
    """A user who takes them as given responses would otherwise let those vote that were cut or left out."""
    answers = {
        "a": [["x", True, 0], ["y", False, 0]],
        "b": [["z", False, Verdict.BROKEN], ["x", True, Verdict.CONTROL]],
    }
    store: Any = SimpleNamespace(
        settings=SimpleNamespace(
            sources={"source_names": ["a", "b"], "generation": {"responses_per_source": 2}}, votes={"asked": ["j"]}
        ),
        by_example=lambda kind, read: [answers[kind.of], answers[kind.of][::-1]],
    )
    row = {"prompt": "p", "skill": "all", "ground_truth": "t"}
    for label, text in (("a_0", "x"), ("a_1", "y"), ("b_0", "z"), ("b_1", "x")):
        row |= {f"response_{label}": text, f"votes_{label}": 0.0, f"score_j_{label}": 0.0}
    rows = list(responses_of(store, [row, row]))
    assert [row["finished"] for row in rows] == [True, False, False, True, False, True, True, False]
    assert [row["response"] for row in rows] == ["x", "y", "z", "x"] * 2
    broken, control = "response whose bytes are not UTF-8, skipped", "response with control tokens, skipped"
    assert [row["left_out"] for row in rows] == [None, None, broken, control, None, None, control, broken]


def test_a_prompt_to_which_all_responses_are_the_same_is_no_preference():
    turn = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}]
    rows = [
        {"chosen": chosen, "rejected": rejected, "skill": "all"} for chosen in (turn, None) for rejected in (turn, None)
    ]
    assert list(preferences_of(rows)) == [
        {"prompt": turn[:1], "chosen": turn[1:], "rejected": turn[1:], "skill": "all"}
    ]


def test_a_judge_that_has_no_part_in_the_vote_any_more_is_not_on_the_card(tmp_path):
    (tmp_path / "samples.parquet").write_bytes(b"")
    sources = {"source_names": ["a"], "sources": {"a": {"model": "demo:guardian"}}, "date": "2026-01-01"}
    judges = {name: {"model": f"demo:{name}"} for name in ("judge-a", "judge-b")}
    settings = SimpleNamespace(sources=sources, votes={"asked": ["judge-b"], "judges": judges})
    store: Any = SimpleNamespace(settings=settings, directory=tmp_path)
    text = card(store, {"responses": 2, "preferences": 0})
    assert "- judge-b: `demo:judge-b`" in text
    assert "judge-a" not in text


def test_a_damaged_table_is_not_exported(prepared, tmp_path):
    _, _, store = prepared
    shutil.copytree(store.directory, tmp_path / "store")
    path = tmp_path / "store" / "samples.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"samples\.parquet is damaged"):
        export(Store.open(tmp_path / "store"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_without_a_preference_is_a_data_set_too(prepared, tmp_path, monkeypatch):
    _, _, store = prepared
    monkeypatch.setattr("profuser.store.export.preferences_of", lambda examples: iter(()))
    assert export(store, tmp_path / "out")["preferences"] == 0
    folder, cache = str(tmp_path / "out"), str(tmp_path / "cache")
    assert len(datasets.load_dataset(folder, split="train", cache_dir=cache)) > 0


@pytest.mark.parametrize("place", ["", "out", "responses/out", "../store/out", ".."])
def test_nothing_is_exported_into_the_store(prepared, tmp_path, place):
    _, _, store = prepared
    shutil.copytree(store.directory, tmp_path / "store")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"--output must be (a new or empty folder|outside of the store), got [^\n]*"):
        export(Store.open(tmp_path / "store"), tmp_path / "store" / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_difference_names_settings_and_shards(prepared, tmp_path, capsys):
    _, _, store = prepared
    shutil.copytree(store.directory, tmp_path / "store")
    with pytest.raises(SystemExit) as end:
        main(["diff", str(store.directory), str(tmp_path / "store")])
    assert not end.value.code
    assert "the stores are the same" in capsys.readouterr().out

    lost = tmp_path / "store" / "truth" / "train-scholar-00000.safetensors"
    content = lost.read_bytes()
    lost.unlink()
    line = f"missing in {tmp_path / 'store'}: truth/train-scholar-00000"
    assert (
        difference(store, Store.open(tmp_path / "store")) == difference(Store.open(tmp_path / "store"), store) == [line]
    )
    lost.write_bytes(content)

    changed = Store.open(tmp_path / "store")
    changed._manifest["settings"]["targets"]["min_reliability"] = 0.5
    changed._manifest["shards"]["targets/train-00000"]["sha256"] = "0" * 64
    del changed._manifest["shards"]["truth/train-scholar-00000"]
    assert difference(store, changed) == [
        "settings differ: align.min_reliability",
        "shards differ: targets/train-00000",
        f"only in {store.directory}: truth/train-scholar-00000",
    ]
    # Where the training prompts lie in another number of shards, what was said on them is compared by the audit tables.
    changed._manifest["divided"]["train"] += 1
    rows = pq.read_table(tmp_path / "store" / "samples.parquet").to_pylist()
    for row in rows[:3]:
        row["response_scholar"] += " indeed"
    content = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), content)
    changed.put_finding("samples.parquet", content.getvalue())
    count = store.divided["train"]
    assert difference(store, changed) == [
        "settings differ: align.min_reliability",
        f"shards of train cannot be compared one by one, because their examples are divided among {count} and {count + 1}",
        f"samples.parquet differs: response_scholar, in 3 of {len(rows)} training prompts",
    ]
    changed._save()
    with pytest.raises(SystemExit) as end:
        main(["diff", str(tmp_path / "store"), str(store.directory)])
    assert end.value.code == 1
    assert json.loads((tmp_path / "store" / "manifest.json").read_text())  # nothing but what was changed above
