"""The division of the examples among the shards of a store, and what is made again where the data has changed."""

import contextlib
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from profuser.errors import ConfigError, DataError
from profuser.prepare import engines
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import Preparation, prepare
from profuser.prepare.responses import Response, generate
from profuser.store import layout
from profuser.store.__main__ import main as store_command
from profuser.store.division import Division, places
from profuser.store.layout import FOLDERS
from profuser.store.store import EXAMPLES, Store
from profuser.text.fit import Verdict


def digests(texts):
    return [bytes([ord(text[0])]) * 32 for text in texts]


def divided(texts, shards):
    return Division.of(digests(texts), digests(texts), shards)


@pytest.mark.parametrize("shards", [1, 2, 5, 40])
def test_a_division_covers_every_example_once_in_the_order_of_the_data(shards):
    division = divided("the quick brown fox jumps".replace(" ", ""), shards)
    parts = division.parts
    assert sorted(example for part in parts for example in part.examples) == list(range(21))
    assert all(part.examples == sorted(part.examples) and len(part) > 0 for part in parts)
    assert [part.number for part in parts] == sorted({part.number for part in parts})
    assert max(part.number for part in parts) < shards
    by_shard = np.array([10 * example for part in parts for example in part.examples])
    assert by_shard[places(division.shard_of)].tolist() == [10 * example for example in range(21)]
    assert all(part.of(range(21)) == part.examples for part in parts)


def test_the_same_prompts_share_a_shard_and_others_do_not_move_them():
    few, more = divided("abcab", 4), divided("xabycabz", 4)
    assert few.shard_of[0] == few.shard_of[3]
    assert more.shard_of[[1, 2, 4, 5, 6]].tolist() == few.shard_of.tolist()
    changed = {part.number for part in few.parts} & {int(more.shard_of[n]) for n in (0, 3, 7)}
    of_few, of_more = ({part.number: part.digest for part in division.parts} for division in (few, more))
    assert {number for number in of_few if of_few[number] != of_more[number]} == changed


def test_the_shard_follows_from_the_first_eight_bytes_of_the_prompts_digest():
    """By another rule the stores that there are would be divided anew."""
    of_prompts = [bytes([*range(n, n + 32)]) for n in range(5)]
    expected = [sum((n + i) << 8 * i for i in range(8)) % 1000 for n in range(5)]
    assert Division.of(of_prompts, of_prompts, 1000).shard_of.tolist() == expected


def test_rows_of_one_prompt_in_another_order_are_another_part():
    prompts, rows = [bytes(32)] * 2, [b"a" * 32, b"b" * 32]
    ((first,), (second,)) = (Division.of(prompts, of, 3).parts for of in (rows, rows[::-1]))
    assert first.digest != second.digest


def test_a_division_of_nothing_has_no_part():
    assert Division.of([], [], 3).parts == []


# --- data that change --------------------------------------------------------------------------------------------------


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def with_rows(run, place: Path, rows: list[dict], store: str = "store", split: str = "train"):
    """The small recipe on other rows of a split, with a store of its own."""
    path = place / f"{store}-{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = replace(run.recipe, data=replace(run.recipe.data, **{split: str(path)}), store=str(place / store))
    return replace(run, recipe=recipe)


def copied(prepared, place: Path) -> list[dict]:
    """Copies the small store to `place / "store"` and returns the training rows it was made of."""
    _, run, store = prepared
    shutil.copytree(store.directory, place / "store")
    return rows_of(run.recipe.data.train)


NEW = {"prompt": "Which stone is the softest?", "response": "Answer: soap.", "skill": "knowledge", "answer": "soap"}

CHANGES = {
    "added at the end": lambda rows: [*rows, NEW],
    "added at the front": lambda rows: [NEW, *rows],
    "taken out": lambda rows: rows[:4] + rows[5:],
    "another ground truth": lambda rows: [*rows[:6], rows[6] | {"response": "Answer: 5."}, *rows[7:]],
}


LONG = ("added at the end", "taken out", "another ground truth")


@pytest.mark.parametrize("change", [pytest.param(c, marks=pytest.mark.long if c in LONG else ()) for c in CHANGES])
def test_rows_that_changed_are_prepared_again_and_the_store_is_that_of_a_fresh_preparation(
    prepared, tmp_path, monkeypatch, capsys, change
):
    old = copied(prepared, tmp_path)
    new = CHANGES[change](old)
    run = with_rows(prepared[1], tmp_path, new)
    asked: list[str] = []

    def counted(model, chat, prompts, *args, **options):
        asked.extend(str(prompt) for prompt in prompts if options["of"] == "scholar train")
        return generate(model, chat, prompts, *args, **options)

    monkeypatch.setattr(engines, "generate", counted)
    store = prepare(run)
    out = capsys.readouterr().out
    before, after = ({p.number: p for p in Inputs.open(r).parts("train")} for r in (prepared[1], run))
    moved = [n for n, part in after.items() if n not in before or before[n].digest != part.digest]
    assert f"store: data.train changed: making shards again ({len(moved)} of {len(after)} of train" in out
    assert 0 < len(moved) < len(after)
    assert sorted(asked) == sorted(new[example]["prompt"] for n in moved for example in after[n].examples)

    # Nothing of it differs from what a preparation makes that begins with these rows.
    fresh = prepare(with_rows(prepared[1], tmp_path, new, "fresh"))
    assert store.digests == fresh.digests
    assert (store.directory / EXAMPLES).read_bytes() == (fresh.directory / EXAMPLES).read_bytes()
    summaries = [{k: v for k, v in s.summary.items() if k != "seconds"} for s in (store, fresh)]
    assert summaries[0] == summaries[1]
    assert Store.finished(store.directory, Inputs.open(run).settings()) is not None


def test_another_held_out_file_leaves_the_training_shards_alone(prepared, tmp_path, capsys):
    copied(prepared, tmp_path)
    rows = rows_of(prepared[1].recipe.data.heldout)
    run = with_rows(prepared[1], tmp_path, rows_of(prepared[1].recipe.data.train))
    run = with_rows(run, tmp_path, [row | {"prompt": row["prompt"] + " Say it."} for row in rows], split="heldout")
    store = prepare(run)
    assert "data.heldout changed" in capsys.readouterr().out
    old, new = prepared[2].digests, store.digests
    assert {name for name in new if new[name] == old.get(name)} >= {name for name in old if "heldout" not in name}
    assert not {name for name in new if "heldout" in name and new[name] == old.get(name)}


def test_the_examples_of_every_shard_are_counted_again_where_a_row_comes_before_them(prepared, tmp_path):
    copied(prepared, tmp_path)
    data = prepared[1].recipe.data
    run = with_rows(prepared[1], tmp_path, rows_of(data.train))
    run = with_rows(run, tmp_path, [NEW, *rows_of(data.validation)], split="validation")
    store, kind = prepare(run), layout.targets("validation")
    parts = Inputs.open(run).parts("validation")
    assert len(parts) > 1
    assert [store.get(kind, part.number)["example"].tolist() for part in parts] == [part.examples for part in parts]


@pytest.mark.long
def test_a_split_that_is_gone_takes_its_shards_along(prepared, tmp_path):
    copied(prepared, tmp_path)
    run = with_rows(prepared[1], tmp_path, rows_of(prepared[1].recipe.data.train))
    recipe = replace(run.recipe, data=replace(run.recipe.data, validation=None))
    store = prepare(replace(run, recipe=recipe))
    assert {name: d for name, d in prepared[2].digests.items() if "/validation" not in name} == store.digests


def test_data_of_which_nothing_can_stay_are_refused_and_the_store_stays(prepared, tmp_path):
    rows = copied(prepared, tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()}
    others = [row | {"prompt": row["prompt"] + "?"} for row in rows]
    with pytest.raises(ConfigError, match=r"other data \(data\.train differ\), of which no shard can stay; .*--fresh"):
        prepare(with_rows(prepared[1], tmp_path, others))
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("files", [0, 1, 2])
def test_a_store_that_was_lost_as_it_was_begun_is_begun_again(prepared, tmp_path, monkeypatch, files):
    settings, divisions = prepared[2].settings, Inputs.open(prepared[1]).divisions
    put, left = os.replace, files

    def put_some(*places):
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        put(*places)

    monkeypatch.setattr(os, "replace", put_some)
    with pytest.raises(KeyboardInterrupt):
        Store.build(tmp_path / "store", settings, divisions)
    monkeypatch.undo()
    store = Store.build(tmp_path / "store", settings, divisions)
    assert np.array_equal(store.shard_of("train"), divisions["train"].shard_of)


def test_training_does_not_make_shards_again_unasked(prepared, tmp_path):
    rows = copied(prepared, tmp_path)
    run = with_rows(prepared[1], tmp_path, [*rows, NEW])
    with contextlib.ExitStack() as held, pytest.raises(ConfigError, match=r"run `python -m profuser\.prepare` with"):
        Preparation.begin(Inputs.open(run), held)


def test_scores_are_those_of_the_responses_that_are_there(prepared, tmp_path, monkeypatch):
    """A damaged shard is asked for again, and what comes may be something else."""
    rows = copied(prepared, tmp_path)
    run = with_rows(prepared[1], tmp_path, rows)
    kind = layout.responses("train", "scholar")
    number = prepared[2].numbers(kind)[0]
    (tmp_path / "store" / f"{kind.shard(number)}.json").write_text("[]")
    monkeypatch.setattr(
        engines, "generate", lambda model, chat, prompts, *_, **__: [[Response("So.", True, Verdict.OK)]] * len(prompts)
    )
    store = prepare(run)
    old, new = prepared[2].digests, store.digests
    changed = {name for name in new if new[name] != old[name]}
    part = next(part for part in Inputs.open(run).parts("train") if part.number == number)
    assert kind.shard(number) in changed
    assert {layout.scores(judge.name).shard(number) for judge in run.recipe.judges} & changed
    assert all(re.search(rf"/train.*-{number:05d}$", name) for name in changed), changed
    texts = store.by_example(kind, lambda n: store.get_json(kind, n))
    assert [texts[example][0][0] for example in part.examples] == ["So."] * len(part)
    table = np.concatenate(
        [store.get(layout.targets("train"), n)["example"] for n in store.numbers(layout.targets("train"))]
    )
    assert set(table.tolist()) <= set(range(len(rows)))


@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1])], ids=["missing", "cut"]
)
def test_a_lost_division_is_noticed_and_written_again(prepared, tmp_path, capsys, damage):
    rows = copied(prepared, tmp_path)
    path = tmp_path / "store" / EXAMPLES
    written = path.read_bytes()
    damage(path)
    store = Store.open(tmp_path / "store")
    with pytest.raises(DataError, match=r"examples\.safetensors must be what was written"):
        store.by_example(
            layout.truth("train", "scholar"), lambda n: store.get(layout.truth("train", "scholar"), n)["nll"]
        )
    with pytest.raises(DataError, match=r"1 of \d+ files are damaged or missing \(examples\.safetensors\)"):
        store_command(["verify", str(store.directory)])
    run = with_rows(prepared[1], tmp_path, rows)
    prepare(run)
    assert "store: examples.safetensors is damaged or missing: writing it again" in capsys.readouterr().out
    assert path.read_bytes() == written


def test_a_kind_of_which_a_shard_is_missing_is_not_all_there(prepared, tmp_path):
    copied(prepared, tmp_path)
    store = Store.open(tmp_path / "store")
    kind = layout.responses("heldout", "scholar")
    assert store.has_all(kind)
    store._drop([kind.shard(store.numbers(kind)[-1])])
    assert not Store.open(store.directory, complete=False).has_all(kind)


def test_what_is_stale_is_gone_before_anything_is_made_again(prepared, tmp_path, monkeypatch):
    """A preparation that is stopped leaves no shard of other rows in the store, which readers would take for those of the data."""
    rows = copied(prepared, tmp_path)
    run = with_rows(prepared[1], tmp_path, CHANGES["another ground truth"](rows))
    monkeypatch.setattr(Preparation, "run", lambda self: self.store)
    store = prepare(run)
    parts = {part.number: part.digest for part in Inputs.open(run).parts("train")}
    kinds = [layout.truth("train", "scholar"), layout.responses("train", "scholar")]
    for kind in kinds:
        numbers = store.numbers(kind)
        assert all(store.origin(kind, number) == parts[number] for number in numbers)
        assert len(numbers) == len(parts) - 1
        assert not store.has_all(kind)


def test_another_column_of_one_row_leaves_the_other_rows_alone(prepared, tmp_path):
    rows = copied(prepared, tmp_path)
    run = with_rows(prepared[1], tmp_path, [*rows, NEW | {"origin": "me"}])
    parts = [{part.number: part.digest for part in Inputs.open(r).parts("train")} for r in (prepared[1], run)]
    assert sum(parts[0][number] != parts[1].get(number) for number in parts[0]) <= 1


def test_a_store_without_a_shard_takes_any_data_and_rows_that_are_gone_are_not_kept(prepared, tmp_path, monkeypatch):
    rows = copied(prepared, tmp_path)
    monkeypatch.setattr(Preparation, "run", lambda self: self.store)
    run = with_rows(prepared[1], tmp_path, rows[:-1])
    store = prepare(run)
    listed = {store._path(name) for name in store.digests}
    assert {path for folder in FOLDERS for path in (store.directory / folder).iterdir()} == listed
    store._drop([*store.digests])
    other = with_rows(prepared[1], tmp_path, [row | {"prompt": row["prompt"] + "?"} for row in rows])
    assert prepare(other).data["train"] != prepared[2].data["train"]
