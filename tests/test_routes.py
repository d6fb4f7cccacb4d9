"""A column of the data names the source of each example: it alone is asked, and nobody else is learnt from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import small_run

from profuser.errors import ConfigError, DataError
from profuser.plan.asked import asked_of_each
from profuser.prepare import engines
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import prepare
from profuser.prepare.responses import read_responses
from profuser.recipe.schedule import Mode
from profuser.store import layout
from profuser.store.export import audit_rows, responses_of
from profuser.text.fit import Verdict
from profuser.train.targets import Targets

NAMES = ("a", "b")
SOURCES = "--sources=[{name: a, model: 'demo:guardian'}, {name: b, model: 'demo:scholar'}]"


JUDGE = "--judges=[{name: v, function: 'profuser.demo.verify:score'}]"


def routed_run(
    directory: Path, *options: str, routes=NAMES, column: str = "route", validation: bool = True, sources=SOURCES
):
    """The small recipe with two sources, between which the rows take turns."""
    run = small_run(directory, sources, "--target=a", "--capture.choice=route", JUDGE, *options)
    for split in ("fusion", "validation")[: 1 + validation]:
        path = directory / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text(
            "".join(json.dumps(row | {column: routes[n % len(routes)]}) + "\n" for n, row in enumerate(rows))
        )
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("routes")
    run = routed_run(directory)
    asked: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        generate = engines.generate

        def counted(model, chat, prompts, config, **options):
            asked[options["of"]] += len(prompts)
            return generate(model, chat, prompts, config, **options)

        patch.setattr(engines, "generate", counted)
        return run, prepare(run), asked


def responses_of_source(store, name):
    kind = layout.responses("train", name)
    return store.by_example(kind, lambda n: read_responses(store, "train", name, n))


def test_only_the_source_that_the_row_names_is_asked(made):
    run, store, asked = made
    rows = Inputs.open(run).rows
    count = len(rows["train"])
    assert asked == {"a train": count // 2, "b train": count // 2, "a heldout": 6, "b heldout": 6}
    for s, name in enumerate(NAMES):
        found = responses_of_source(store, name)
        assert len(found) == count
        for example, (response,) in enumerate(found):
            assert (response.verdict == Verdict.NOT_WINNER) == (example % 2 != s)
            assert response.eligible <= (example % 2 == s)
        # The ground truth is scored by it alone, but for held-out examples, on which the sources are compared.
        for split in ("train", "validation", "heldout"):
            kind = layout.truth(split, name)
            reasons = np.array(store.by_example(kind, lambda n, kind=kind: store.get(kind, n)["reason"]))
            expected = [split != "heldout" and e % 2 != s for e in range(len(rows[split]))]
            assert (reasons == Verdict.NOT_WINNER).tolist() == expected


def test_what_is_learnt_comes_from_that_source(made):
    _, store, _ = made
    seen: Counter[Mode] = Counter()
    for split in ("train", "validation"):
        for instruction in Targets(store, split):
            for sequence in instruction:
                seen[sequence.mode] += 1
                assert sequence.winner == sequence.example % 2
                assert set(sequence.row_source.tolist()) <= {sequence.example % 2}
    assert min(seen[Mode.TRAINING], seen[Mode.INFERENCE]) > 0
    wins = store.summary["min_ce_wins"]
    assert sum(of_skill.get("a", 0) for of_skill in wins.values()) == sum(
        of_skill.get("b", 0) for of_skill in wins.values()
    )
    assert Verdict.NOT_WINNER.label not in store.summary["handled"]
    exported = list(responses_of(store, audit_rows(store)))
    assert [(row["example"], row["source"]) for row in exported] == [(e, NAMES[e % 2]) for e in range(len(exported))]


def test_the_plan_counts_the_rows_that_each_source_is_asked_about(tmp_path):
    inputs = Inputs.open(routed_run(tmp_path, routes=("a", "b", "b", "b")))
    shares = {name: asked.share for name, asked in asked_of_each(inputs.recipe, inputs).items()}
    routes = [row["route"] for row in inputs.rows["train"]]
    assert shares == {name: routes.count(name) / len(routes) for name in NAMES}
    assert shares["a"] < shares["b"]


def test_another_column_or_choice_is_another_store(made, tmp_path):
    run, store, _ = made
    directory = Path(str(run.recipe.store)).parent
    assert prepare(run).digests == store.digests
    with pytest.raises(ConfigError, match=r"capture\.choice.*route_column differ"):
        prepare(routed_run(directory, "--capture.choice=min_ce"))
    with pytest.raises(ConfigError, match=r"captured with other settings \(data\.route_column"):
        prepare(routed_run(directory, "--data.route_column=teacher", column="teacher"))
    # A route leaves nothing to mix in training, and Min-CE is what chooses on a validation row without one.
    with pytest.raises(
        ConfigError,
        match=r"optim\.combine must be left out with capture\.choice: route, which leaves one source to learn from, got avg_ce",
    ):
        routed_run(tmp_path, "--optim.combine=avg_ce")


def test_a_route_can_be_said_where_the_sources_are_combined(made, tmp_path):
    run, store, _ = made
    said = small_run(Path(str(run.recipe.store)).parent, SOURCES, "--target=a", "--optim.combine=route", JUDGE).recipe
    assert (said.capture, said.optim) == (run.recipe.capture, run.recipe.optim)
    assert prepare(routed_run(Path(str(run.recipe.store)).parent, "--optim.combine=route")).digests == store.digests
    with pytest.raises(
        ConfigError, match=r"optim\.combine must be left out with capture\.choice: weights, .* got route"
    ):
        routed_run(tmp_path, "--capture.choice=weights", "--optim.combine=route")


@pytest.mark.parametrize("value", ["c", "A", "", None, 1, ["a"], {"name": "a"}])
def test_a_route_that_names_no_source_is_refused_with_its_row(tmp_path, value):
    with pytest.raises(
        DataError, match=r"fusion\.jsonl, row 2 \(from 0\): the column 'route' must name a source \(a, b\), got"
    ) as error:
        Inputs.open(routed_run(tmp_path, routes=["a", "b", value]))
    assert "\n" not in str(error.value)
    assert repr(value) in str(error.value)


def test_the_column_may_have_another_name_and_must_be_there(tmp_path):
    run = routed_run(tmp_path, "--data.route_column=teacher", column="teacher", validation=False)
    inputs = Inputs.open(run)
    assert inputs.routed("train", "a")[:3].tolist() == [True, False, True]
    assert all(inputs.routed("validation", "a"))  # which has no such column, so that all are asked
    assert all(inputs.routed("heldout", "a"))
    with pytest.raises(
        DataError,
        match=r"must have the column 'route' \(data\.route_column\) with capture\.choice: route, found.* take route out of the rec",
    ):
        Inputs.open(routed_run(tmp_path, column="other"))


def test_given_responses_are_needed_where_the_source_is_asked(tmp_path):
    run = routed_run(tmp_path)
    rows = Inputs.open(run).rows["train"]
    path = tmp_path / "b.jsonl"

    def opened(numbers):
        path.write_text(
            "".join(json.dumps({"prompt": rows[n]["prompt"], "response": f"Answer: {n}."}) + "\n" for n in numbers)
        )
        sources = SOURCES.replace("'demo:scholar'", f"'demo:scholar', responses: '{path}'")
        return routed_run(tmp_path, f"--store={tmp_path / 'new'}", sources=sources)

    store = prepare(opened(range(1, len(rows), 2)))
    found = responses_of_source(store, "b")
    assert [response.text for (response,) in found] == ["" if n % 2 == 0 else f"Answer: {n}." for n in range(len(rows))]
    with pytest.raises(DataError, match=r"it has 0 to example 1 \(from 0\)"):
        Inputs.open(opened(range(3, len(rows), 2)))
