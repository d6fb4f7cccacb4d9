"""Preparation: what becomes a target, what is cut or left out, and when a store is used again."""

import contextlib
import datetime
import json
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import small_run

from profuser.alignment.types import KINDS
from profuser.errors import ConfigError, DataError
from profuser.models.load import chat_format
from profuser.prepare.announce import announce
from profuser.prepare.data import load_examples
from profuser.prepare.inputs import Inputs, check_ground_truth, load_split, settled_dtype
from profuser.prepare.judges import judge_fingerprint
from profuser.prepare.phases import Preparation, align_source, prepare
from profuser.prepare.summary import alignment_summary, handled
from profuser.recipe.compare import differing_keys
from profuser.recipe.data import DataConfig, DataLocation
from profuser.recipe.generation import SourceGenerationConfig
from profuser.recipe.schedule import Mode
from profuser.recipe.schema import JudgeConfig, SourceConfig
from profuser.store import layout
from profuser.store.store import Store
from profuser.text.fit import Fitted, Verdict, fit
from profuser.train.targets import Targets

NAMES = ("guardian", "scholar", "reckoner")


def sequences_of(targets):
    return [s for instruction in targets for s in instruction]


@pytest.fixture(scope="module")
def chats():
    return [chat_format(SourceConfig(name=n, model=f"demo:{n}")) for n in NAMES]


def test_a_response_that_fits_is_left_alone(chats):
    target, *sources = chats
    fitted = fit(target, sources, "Hi", "A bozun is a stone.", 256)
    assert fitted == Fitted("A bozun is a stone.", cut=False, verdict=Verdict.OK)


def test_an_overlong_response_is_cut_once_for_all_at_a_target_token(chats):
    response = "A bozun is a stone. " * 20 + "日本語 " * 5
    prompt = "Hi"
    fitted = fit(chats[0], chats[1:], prompt, response.strip(), 64)
    text = fitted.text
    assert (fitted.cut, fitted.verdict) == (True, Verdict.OK)
    assert response.startswith(text)
    lengths = [len(c.encode(prompt, text, complete=False).input_ids) for c in chats]
    assert max(lengths) <= 64
    ends = [stop for _, stop in chats[0].encode(prompt, response.strip()).spans]
    assert len(text.encode()) in ends
    longer = next((e for e in ends if e > len(text.encode())), None)
    grown = response.encode()[:longer].decode(errors="ignore")
    assert max(len(c.encode(prompt, grown, complete=False).input_ids) for c in chats) > 64


def test_an_overlong_response_may_be_left_out_instead(chats, prepared):
    target, *sources = chats
    response = "A bozun is a stone. " * 20
    assert fit(target, sources, "Hi", response, 64, cuts=False) == Fitted.unused(Verdict.TOO_LONG)
    assert fit(target, sources, "Hi", "A bozun is a stone.", 64, cuts=False).verdict == Verdict.OK

    # As data.too_long it is another store, and one that cuts is as stores have always been.
    run = prepared[1]
    data = replace(run.recipe.data, too_long="skip", max_length=45)
    inputs = Inputs.open(replace(run, recipe=replace(run.recipe, data=data)))
    verdicts = {text.verdict for text in inputs.fitted["train"]}
    assert verdicts == {Verdict.OK, Verdict.TOO_LONG}
    assert not any(text.cut for text in inputs.fitted["train"])
    assert inputs.settings().sources["data"]["too_long"] == "skip"
    assert "too_long" not in Inputs.open(run).settings().sources["data"]


def test_what_a_source_reads_at_a_time_is_no_setting_of_the_store(prepared):
    inputs = Inputs.open(prepared[1])
    capture = inputs.recipe.capture
    of_tokens = replace(capture, tokens_per_batch=100)
    for changed in (replace(capture, batch_size=3), of_tokens, replace(of_tokens, layout="packed")):
        assert replace(inputs, recipe=replace(inputs.recipe, capture=changed)).settings() == inputs.settings()


def test_what_decides_what_a_store_holds_is_a_setting_of_it_and_only_that(prepared, monkeypatch):
    inputs = Inputs.open(prepared[1])
    recipe, before = inputs.recipe, asdict(inputs.settings())
    first, *rest = recipe.sources

    def differing(**changes) -> list[str]:
        return differing_keys(before, asdict(replace(inputs, recipe=replace(recipe, **changes)).settings()))

    def of_source(**changes) -> list[str]:
        return differing(sources=[replace(first, **changes), *rest])

    hot, source = replace(recipe.generation, temperature=0.7), "sources.sources.guardian"
    assert differing(seed=recipe.seed + 1) == []  # nothing is drawn by it
    assert differing(generation=hot) == ["sources.generation.seed", "sources.generation.temperature"]
    its = SourceGenerationConfig(temperature=0.7, batch_size=3)
    assert of_source(generation=its) == [f"{source}.generation"]
    assert of_source(generation=SourceGenerationConfig(batch_size=3, engine="transformers")) == []
    warm = asdict(replace(inputs, recipe=replace(recipe, sources=[replace(first, generation=its), *rest])).settings())
    assert warm["sources"]["sources"]["guardian"]["generation"] == {"temperature": 0.7, "seed": recipe.seed}
    assert of_source(revision="v2") == [f"{source}.revision"]
    assert of_source(reasoning="strip") == [f"{source}.reasoning"]
    assert differing(data=replace(recipe.data, max_length=99)) == ["sources.data.max_length"]
    routed, weighed = replace(recipe.capture, choice="route"), replace(recipe.capture, choice="weights")
    found = differing(capture=routed, data=replace(recipe.data, route_column="its"))
    assert found == ["sources.capture.choice", "sources.data.route_column"]
    found = differing(capture=weighed, data=replace(recipe.data, weights_column="its"))
    assert found == ["sources.capture.choice", "sources.data.weights_column"]
    judges = [replace(recipe.judges[0], floor=0.5), *recipe.judges[1:]]
    assert differing(judges=judges) == [f"votes.floors.{judges[0].name}"]
    assert differing(judging=replace(recipe.judging, rule="borda")) == ["votes.judging.rule"]
    assert differing(judging=replace(recipe.judging, no_signal="ground_truth")) == ["targets.judging.no_signal"]
    another_day = replace(inputs, date=inputs.date + datetime.timedelta(days=1))
    assert differing_keys(before, asdict(another_day.settings())) == ["sources.date"]
    with mock.patch("profuser.prepare.inputs.judge_fingerprint", return_value="another"):
        names = [judge.name for judge in recipe.judges]
        assert differing() == sorted(f"votes.judges.{name}.files" for name in names)
        filed = JudgeConfig(name=names[0], scores="scores.jsonl")
        assert f"votes.judges.{names[0]}.scores" in differing(judges=[filed, *recipe.judges[1:]])
    monkeypatch.setattr(inputs.target.tokenizer, "chat_template", "another")  # that of the first source as well
    assert differing() == [f"{source}.template", "sources.target.template"]


def test_held_out_prompts_are_asked_of_all_sources_once_whatever_the_route_and_the_limit(prepared):
    inputs = Inputs.open(prepared[1])
    recipe = inputs.recipe
    recipe = replace(
        recipe,
        capture=replace(recipe.capture, choice="route"),
        data=replace(recipe.data, route_column="by", limit=2),
        generation=replace(recipe.generation, responses_per_source=3, temperature=0.7),
    )
    rows: Any = {split: [{"by": "scholar"}] * 2 for split in ("train", "heldout")}
    routed = replace(inputs, recipe=recipe, rows=rows)
    asked = [routed.routed(split, source).all() for split in ("train", "heldout") for source in NAMES[:2]]
    assert asked == [False, True, True, True]
    assert (routed.responses_per_prompt("train"), routed.responses_per_prompt("heldout")) == (3, 1)
    assert len(load_split(recipe, "heldout")) == len(inputs.rows["heldout"]) > 2  # which have no such column
    with pytest.raises(DataError, match="by"):
        load_split(recipe, "train")
    limited = replace(inputs.recipe, data=replace(inputs.recipe.data, limit=2))
    assert [len(load_split(limited, split)) for split in ("train", "heldout")] == [2, len(inputs.rows["heldout"])]
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, match=None))
    check_ground_truth(recipe, cast(Any, [{"response": ""}, {"response": "4"}]))
    with pytest.raises(DataError, match="every response is empty"):
        check_ground_truth(recipe, cast(Any, [{"response": ""}]))


def test_a_store_that_is_there_keeps_its_arithmetic_its_division_and_its_date(prepared, tmp_path):
    directory, on_gpu = prepared[2].directory, torch.device("cuda")
    assert [settled_dtype("auto", place, on_gpu) for place in (directory, tmp_path)] == ["float32", "bfloat16"]
    inputs = Inputs.open(prepared[1])
    finer = replace(inputs, recipe=replace(inputs.recipe, capture=replace(inputs.recipe.capture, shard_size=1)))
    elsewhere = replace(finer, store_dir=tmp_path)
    numbers = [len(one.parts("train")) for one in (inputs, finer, elsewhere)]
    assert numbers[0] == numbers[1] < numbers[2]
    with mock.patch("profuser.prepare.inputs.settled_date", return_value=inputs.date) as settled:
        for fresh in (False, True):
            Inputs.open(prepared[1], fresh=fresh)
    assert [call.args[1] for call in settled.call_args_list] == [directory, None]


def test_a_cut_response_has_no_end_of_turn_to_learn(chats):
    e = chats[0].encode("Hi", "A bozun is", complete=False)
    assert e.end_of_turn is None
    assert e.stop == len(e.input_ids)


@pytest.mark.parametrize("is_cut", [False, True])
def test_of_a_cut_text_the_target_learns_no_end_of_turn(prepared, is_cut):
    inputs: Any = Inputs.open(prepared[1])
    inputs.fitted = {"train": [Fitted("A bozun is", is_cut, Verdict.OK)]}
    row, lease = inputs.rows["train"][0], cast(Any, None)
    text: Any = Preparation(inputs, prepared[2], lease)._target_text("train", Mode.TRAINING, 0, row, [])
    expected = inputs.target.encode(row["prompt"], "A bozun is", complete=not is_cut)
    assert list(text.encoded.input_ids) == list(expected.input_ids)


def test_an_overlong_prompt_and_an_empty_response_are_left_out_with_their_reason(chats):
    target, *sources = chats
    assert fit(target, sources, "word " * 100, "Answer: x.", 32).verdict == Verdict.TOO_LONG
    assert fit(target, sources, "Hi", "", 32).verdict == Verdict.EMPTY


def test_inference_targets_are_the_vote_winners_response_and_only_the_winner_takes_part(prepared):
    _, _, store = prepared
    targets = Targets(store, "train")
    table = pq.read_table(store.directory / "samples.parquet").to_pylist()
    chat = chat_format(SourceConfig(name="guardian", model="demo:guardian"))
    seen = 0
    for s in sequences_of(targets):
        row = table[s.example]
        decoded: Any = chat.tokenizer.decode(s.input_ids[s.label_mask], skip_special_tokens=True)
        text = decoded.strip()
        if s.mode == Mode.TRAINING:
            assert text == row["ground_truth"]
            assert NAMES[int(np.argmin(s.source_ce))] == row["min_ce_winner"]
        else:
            seen += 1
            winner = row["vote_winner"]
            assert text == row[f"response_{winner}"]
            assert [NAMES[i] for i in np.flatnonzero(np.isfinite(s.source_ce))] == [winner]
            assert set(s.row_source.tolist()) <= {NAMES.index(winner)}
    assert seen


def test_every_row_is_a_distribution_and_its_gold_token_is_likely_under_the_target_as_source(prepared):
    """Mass and tail sum to one. Row t speaks of token t and is not shifted, so the token is its most likely one."""
    _, _, store = prepared
    own = {s: [] for s in range(3)}
    for s in sequences_of(Targets(store, "train")):
        for r in range(len(s.row_position)):
            part = slice(s.entry_offsets[r], s.entry_offsets[r + 1])
            mass = np.exp(s.entry_logprobs[part].astype(np.float64)).sum()
            assert mass + s.row_tail[r] == pytest.approx(1, abs=5e-3)  # log-probabilities are stored in fp16
            assert s.label_mask[s.row_position[r]]
            if s.mode == Mode.INFERENCE:  # responses are greedy, so the gold token is the most likely one
                own[s.row_source[r]].append(
                    s.input_ids[s.row_position[r]] == s.entry_ids[part][s.entry_logprobs[part].argmax()]
                )
    assert np.mean([x for v in own.values() for x in v]) > 0.97


def test_a_winners_response_need_not_fit_into_the_sources_that_did_not_win(prepared):
    inputs, lease = Inputs.open(prepared[1]), cast(Any, None)
    ballots = Preparation(inputs, prepared[2], lease).ballots
    assert ballots is not None
    example = next(n for n in range(len(ballots.winner)) if ballots.winning_source(n) == 0)
    prompt, text = inputs.rows["train"][example]["prompt"], ballots.winning_text(example)
    own, other = (len(inputs.chats[name].encode(prompt, text).input_ids) for name in NAMES[:2])
    assert own < other
    recipe = replace(inputs.recipe, data=replace(inputs.recipe.data, max_length=own))
    fitted = Preparation(replace(inputs, recipe=recipe), prepared[2], lease)._winning(example)
    assert fitted == Fitted(text, cut=False, verdict=Verdict.OK)


def test_the_aligners_are_those_that_the_recipe_asks_for(prepared):
    inputs, lease = Inputs.open(prepared[1]), cast(Any, None)
    recipe, source = inputs.recipe, inputs.chats["scholar"]
    found = []
    for align in (replace(recipe.align, min_reliability=0.3), replace(recipe.align, mode="fusellm", fallback="label")):
        changed = replace(recipe, align=align, capture=replace(recipe.capture, top_k=4))
        preparation = Preparation(replace(inputs, recipe=changed), prepared[2], lease)
        with (
            mock.patch("profuser.prepare.phases.byte_aligner") as ours,
            mock.patch("profuser.prepare.phases.FuseLLMAligner") as fusellm,
        ):
            preparation._aligner(source)
        found.append((ours.call_args, fusellm.call_args))
    threads = torch.get_num_threads()
    assert found == [
        (mock.call(inputs.target, source, top_k=4, min_reliability=0.3, threads=threads), None),
        (None, mock.call(inputs.target, source, top_k=4, fallback="label")),
    ]


def test_what_is_kept_of_an_unfinished_shard_is_that_of_its_prompts_responses_and_judge(prepared, monkeypatch):
    inputs = Inputs.open(prepared[1])
    preparation: Any = Preparation(inputs, prepared[2], cast(Any, None))
    part, source, judge = inputs.parts("train")[0], inputs.recipe.sources[0], inputs.recipe.judges[0]
    kind, bar = layout.scores(judge.name), mock.Mock()
    preparation.sharing = mock.Mock(claimed=lambda *_: (one for one in [(kind, part, mock.Mock(), bar)]))
    monkeypatch.setattr(preparation.origins, "is_made", lambda *_: True)  # nothing is written
    with mock.patch("profuser.prepare.phases.Unfinished") as unfinished:
        preparation._judge_by(judge)
        preparation._answer("train", part, source, lambda asked, progress: [[]] * len(asked.prompts), bar)
    assert [call.args[1:] for call in unfinished.call_args_list] == [
        (kind, part.number, f"{judge_fingerprint(judge)} {preparation.origins.of(kind, part)}"),
        (layout.responses("train", source.name), part.number, f"transformers {part.digest}"),
    ]


def test_the_alignment_is_summed_over_the_shards():
    shape = (len(Mode), 2)
    shard = {"kinds": np.zeros((*shape, len(KINDS)), int), "reliability": np.zeros((*shape, 10), int)}
    shard |= {"covered": np.zeros(shape, int), "mapped_mass": np.zeros(shape)}
    place = int(Mode.TRAINING), 1
    shard["kinds"][place][:2] = 6, 2
    shard["covered"][place], shard["mapped_mass"][place], shard["reliability"][place][9] = 4, 3.0, 4
    found = alignment_summary([shard, shard], ["a", "b"])
    shares = dict(zip(KINDS, (0.75, 0.25, *[0.0] * len(KINDS)), strict=False))
    sums = {"positions": 16, "coverage": 0.5, "mapped_mass": 0.75, "reliability": [0] * 9 + [8]}
    assert found == {"training": {"b": shares | sums}}


def test_a_source_that_gave_no_number_is_not_aligned():
    scored = [None, *(mock.Mock(nll=nll) for nll in (1.0, math.nan, math.inf))]
    texts: Any = [mock.Mock(text=str(n), scored=[response]) for n, response in enumerate(scored)]
    aligner = mock.Mock(align_batch=lambda texts, encoded, captures: texts)
    assert align_source(aligner, texts, 0) == {1: b"1"}


def test_a_second_preparation_does_nothing(prepared):
    _, run, store = prepared
    before = {p: p.stat().st_mtime_ns for p in store.directory.rglob("*.safetensors")}
    assert prepare(run).complete
    assert before == {p: p.stat().st_mtime_ns for p in store.directory.rglob("*.safetensors")}


def test_another_alignment_rebuilds_the_targets_from_the_captures(prepared, tmp_path):
    import shutil

    directory, run, _ = prepared
    shutil.copytree(directory / "store", tmp_path / "store")
    recipe = replace(run.recipe, store=str(tmp_path / "store"), align=replace(run.recipe.align, min_reliability=0.9999))

    def captures():
        folders = ("truth", "responses", "scores", "winners")
        return {p: p.stat().st_mtime_ns for folder in folders for p in (tmp_path / "store" / folder).iterdir()}

    before = captures()
    store = prepare(replace(run, recipe=recipe))
    assert captures() == before
    assert store.settings.targets["min_reliability"] == 0.9999
    other = replace(run.recipe, store=str(tmp_path / "store"), capture=replace(run.recipe.capture, top_k=3))
    with pytest.raises(ConfigError, match=r"capture\.top_k"):
        prepare(replace(run, recipe=other))


@pytest.mark.long
def test_sources_are_asked_again_when_it_changes_whether_their_numbers_are_followed(prepared, tmp_path, capsys):
    """A store that goes on with the setting changed holds what a new store would. The answers and scores stay."""
    _, run, _ = prepared
    judged = replace(run.recipe, data=replace(run.recipe.data, train=str(tmp_path / "train.jsonl"), heldout=None))
    content = [{"prompt": f"Eve has {n} eggs and loses 2.", "response": f"Answer: {n - 2}."} for n in (7, 15, 31)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))

    def targets(store: str, follow: bool) -> list[dict[str, list]]:
        recipe = replace(judged, store=str(tmp_path / store), align=replace(judged.align, follow_numbers=follow))
        made, kind = prepare(replace(run, recipe=recipe)), layout.targets("train")
        return [{key: array.tolist() for key, array in made.get(kind, n).items()} for n in made.numbers(kind)]

    without = targets("one", False)
    answers = {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "responses").iterdir()}
    capsys.readouterr()
    followed = targets("one", True)
    assert "follow_numbers changed: capturing the sources again" in capsys.readouterr().out
    assert followed == targets("new", True) != without
    assert targets("one", False) == without
    assert answers == {path: path.stat().st_mtime_ns for path in (tmp_path / "one" / "responses").iterdir()}


def test_a_schedule_with_inference_mode_needs_judges(prepared, tmp_path):
    _, run, _ = prepared
    with pytest.raises(ConfigError, match="judges"):
        prepare(replace(run, recipe=replace(run.recipe, judges=[], store=str(tmp_path / "s"))))


def test_without_judges_ground_truth_schedules_still_work(prepared, tmp_path):
    _, run, _ = prepared
    data = replace(run.recipe.data, validation=None, heldout=None)
    recipe = replace(run.recipe, judges=[], schedule="fusellm", data=data, store=str(tmp_path / "s"))
    store = prepare(replace(run, recipe=recipe))
    assert {s.mode for s in sequences_of(Targets(store, "train"))} == {Mode.TRAINING}
    summary = json.loads((store.directory / "summary.json").read_text())
    assert summary["vote_wins"] == {}


def test_empty_ground_truths_and_literal_specials_are_counted_and_harmless(prepared, tmp_path):
    _, run, _ = prepared
    specials = chat_format(SourceConfig(name="guardian", model="demo:guardian")).tokenizer.all_special_tokens
    rows = [
        {"prompt": "Say nothing.", "response": "   ", "skill": "odd"},
        {"prompt": f"What is {specials[0]}?", "response": f"It ends {specials[0]} here.", "skill": "odd"},
        {"prompt": "How does a bozun taste?", "response": "Answer: bitter.", "skill": "odd"},
    ]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    recipe = replace(
        run.recipe,
        data=replace(run.recipe.data, train=str(path), validation=None, heldout=None),
        store=str(tmp_path / "s"),
    )
    store = prepare(replace(run, recipe=recipe))
    handled = json.loads((store.directory / "summary.json").read_text())["handled"]
    assert handled["empty response, skipped"] == 1
    truths = [s for s in sequences_of(Targets(store, "train")) if s.mode == Mode.TRAINING]
    assert [s.example for s in truths] == [1, 2]
    control = set(chat_format(SourceConfig(name="guardian", model="demo:guardian")).tokenizer.all_special_ids)
    assert not control & set(truths[0].input_ids[truths[0].label_mask][:-1].tolist())
    assert Store.open(store.directory).complete


def test_a_target_that_is_no_source_keeps_its_own_tokenizer(prepared, tmp_path):
    """Here the name of one source is also the beginning of the other's."""
    _, run, _ = prepared
    target = chat_format(SourceConfig(name="g", model="demo:guardian"))
    recipe = replace(
        run.recipe,
        sources=[SourceConfig(name="s", model="demo:scholar"), SourceConfig(name="s-0.5b", model="demo:reckoner")],
        target="demo:guardian",
        data=replace(run.recipe.data, validation=None, heldout=None),
        store=str(tmp_path / "s"),
    )
    store = prepare(replace(run, recipe=recipe))
    for s in sequences_of(Targets(store, "train")):
        assert "<|im_start|>" in target.tokenizer.decode(s.input_ids)
    assert (
        store.numbers(layout.responses("train", "s")) == store.numbers(layout.responses("train", "s-0.5b")) == [0, 1, 2]
    )


def test_changed_judge_columns_make_another_store(prepared, tmp_path):
    _, run, store = prepared
    rows = [json.loads(line) for line in Path(run.recipe.data.train).read_text().splitlines()]
    path = tmp_path / "other.jsonl"
    path.write_text("".join(json.dumps({**row, "answer": "?"}) + "\n" for row in rows))
    recipe = replace(run.recipe, data=replace(run.recipe.data, train=str(path)), store=str(store.directory))
    with pytest.raises(ConfigError, match=r"data\.train"):
        prepare(replace(run, recipe=recipe))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"prompt": "p"}', "must have the columns prompt and response, "),
        ('{"prompt": ["p"], "response": "r"}', "must hold text"),
        ('{"prompt": "p", "response": "r", "skill": "mean"}', "mean"),
        ('{"prompt": "p", "resp', "cannot be read"),
        ("", "cannot be read|at least one row"),
    ],
)
def test_bad_data_is_refused_with_the_reason(tmp_path, text, expected):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=expected):
        load_examples(DataConfig(train=str(path)), str(path))


def test_odd_cells_stay_texts(tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("prompt,response\np,NA\nq,0\n")
    assert [r["response"] for r in load_examples(DataConfig(train=str(path)), str(path))] == ["NA", "0"]


def test_a_judge_that_never_scores_is_an_error(prepared, tmp_path):
    _, run, _ = prepared
    shutil.copytree(run.store_dir, tmp_path / "s")  # it has the responses already
    judges = [JudgeConfig(name="broken", function="test_prepare:always_nan")]
    with pytest.raises(DataError, match="judge broken"):
        prepare(replace(run, recipe=replace(run.recipe, judges=judges, store=str(tmp_path / "s"))))


def always_nan(example, responses):
    return [float("nan")] * len(responses)


def test_prompts_that_are_trained_on_are_counted_before_the_run_and_after_it(tmp_path, capsys):
    """The training split and the held-out one are two splits of one folder here."""
    run = small_run(tmp_path)
    training, asked = (
        Path(str(path)).read_text().splitlines() for path in (run.recipe.data.train, run.recipe.data.heldout)
    )
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(training))
    (tmp_path / "set" / "test.jsonl").write_text("\n".join([*asked, *training[:3]]))
    test = DataLocation(path=str(tmp_path / "set"), split="test")
    data = replace(run.recipe.data, train=str(tmp_path / "set"), heldout=test)
    with contextlib.ExitStack() as held:
        preparation = Preparation.begin(Inputs.open(replace(run, recipe=replace(run.recipe, data=data))), held)
    assert [row["prompt"] for row in preparation.inputs.rows["heldout"]] == [
        json.loads(row)["prompt"] for row in [*asked, *training[:3]]
    ]
    announce("prepare", preparation)
    said = f"data.heldout shares prompts with data.train: 3 of its {len(asked) + 3} prompts are trained on"
    assert said in capsys.readouterr().out
    assert handled(preparation.inputs, preparation.store) == {"held-out prompt that is trained on as well, kept": 3}


@pytest.mark.filterwarnings("error:coroutine", "error::pytest.PytestUnraisableExceptionWarning")
def test_a_judge_that_is_wrong_is_found_before_any_model_runs(prepared, tmp_path, monkeypatch):
    _, run, _ = prepared
    monkeypatch.setattr(
        "profuser.prepare.capture_shards.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    for n, (name, said) in enumerate(WRONG_JUDGES.items()):
        judges = [JudgeConfig(name="wrong", function=f"test_prepare:{name}")]
        with pytest.raises(DataError, match=f"judge wrong: test_prepare:{name} must return one number per .*{said}"):
            prepare(replace(run, recipe=replace(run.recipe, judges=judges, store=str(tmp_path / str(n)))))


def test_a_judge_is_tried_on_the_first_example_with_as_many_responses_as_it_will_get(prepared, tmp_path, monkeypatch):
    _, run, store = prepared
    monkeypatch.setattr(
        "profuser.prepare.capture_shards.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    generation = replace(run.recipe.generation, responses_per_source=2, temperature=1.0)
    judges = [JudgeConfig(name="curious", function="test_prepare:remember")]
    recipe = replace(run.recipe, judges=judges, generation=generation, store=str(tmp_path / "s"))
    seen.clear()
    with pytest.raises(pytest.fail.Exception, match="a model was loaded"):
        prepare(replace(run, recipe=recipe))
    ((example, responses),) = seen
    assert example["prompt"] == json.loads(Path(run.recipe.data.train).read_text().splitlines()[0])["prompt"]
    assert len(set(responses)) == 2 * len(run.recipe.sources)
    # A store that has the scores does not call its judges again.
    monkeypatch.setattr("profuser.prepare.inputs.try_function_judge", lambda *_: pytest.fail("a judge was called"))
    assert prepare(run).directory == store.directory


seen: list = []


def remember(example, responses):
    seen.append((example, responses))
    return [0.0] * len(responses)


def no_return(example, responses): ...


def one_number(example, responses):
    return 1.0


def too_few(example, responses):
    return [1.0] * (len(responses) - 1)


def too_large(example, responses):
    return [10.0 ** (39 + n) for n in range(len(responses))]


async def waited_for(example, responses):
    return [1.0] * len(responses)


def digits(example, responses):
    return "1" * len(responses)


def unordered(example, responses):
    return {float(n) for n in range(len(responses))}


def words(example, responses):
    return ["good"] * len(responses)


def late(example, responses):
    yield 1.0
    raise KeyError("late")


def leaving(example, responses):
    raise SystemExit(0)


WRONG_JUDGES = {
    "no_return": "returned None",
    "one_number": r"returned 1\.0",
    "too_few": "returned 2 numbers for 3 responses",
    "too_large": r"returned 1e\+39, and scores are kept in fp32",
    "waited_for": "returned <coroutine",
    "digits": "returned '111'",
    "unordered": "returned {",
    "words": "returned .'good'",
    "late": "returned <generator",
    "leaving": "raised SystemExit",
}
