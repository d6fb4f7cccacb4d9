"""The timed probe behind a plan: what it multiplies with what, what it leaves uncounted, and that it keeps nothing."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from command_runs import folder, run

from profuser.errors import ConfigError, Interrupted, Terminated
from profuser.plan import probe
from profuser.plan.probe import (
    FIRST,
    Amounts,
    Handful,
    Timed,
    characters,
    check_modes,
    default_count,
    nothing_kept,
    of_steps,
)
from profuser.plan.text import exactly, probed
from profuser.prepare.data import Examples
from profuser.prepare.inputs import Inputs
from profuser.prepare.sharing import ShardTook, Took
from profuser.recipe.data import Split
from profuser.recipe.parse import parse_run
from profuser.recipe.schedule import plan
from profuser.store import layout
from profuser.store.division import Part
from profuser.train.targets import Targets


def examples(*lengths: int) -> Examples:
    """Rows whose texts have so many characters."""
    return Examples([{"prompt": "p", "response": "r" * (n - 1), "skill": "all"} for n in lengths], ())


@pytest.fixture(scope="module")
def inputs(prepared) -> Inputs:
    """The inputs of the small recipe: 12 training, 6 validation and 6 held-out rows."""
    return Inputs.open(prepared[1])


@pytest.fixture(scope="module")
def handful(inputs, tmp_path_factory) -> Handful:
    return Handful.of(inputs, tmp_path_factory.mktemp("probe") / "store", 4)


class TestAmounts:
    def test_texts_count_by_their_characters_and_prompts_by_their_number(self):
        rows: dict[Split, Examples] = {
            "train": examples(10, 20, 30, 40),
            "validation": examples(50),
            "heldout": examples(25, 25, 50),
        }
        amounts = Amounts.of(rows, examples(10, 40))
        assert (amounts.prompts, amounts.texts, amounts.all_texts) == (2, 2, 5)
        assert (amounts.heldout, amounts.validation, amounts.per_example) == (1.5, 0.5, 1)

    def test_a_handful_of_short_texts_stands_for_longer_ones(self):
        amounts = Amounts.of({"train": examples(10, 10, 40, 40)}, examples(10, 10))
        assert (amounts.texts, amounts.per_example, amounts.heldout) == (5, 2.5, 0)

    def test_empty_texts_divide_nothing_by_0(self):
        assert Amounts.of({"train": examples(1)}, [{"prompt": "", "response": ""}]).texts == 1


class TestHandful:
    def test_it_has_random_rows_after_those_that_go_first(self, inputs, handful):
        texts = [row["prompt"] for row in inputs.rows["train"]]
        chosen = [row["prompt"] for row in handful.handful()]
        assert len(handful.rows["train"]) == FIRST + 4
        assert [part.examples for part in handful.parts("train")] == [[*range(FIRST)], [*range(FIRST, FIRST + 4)]]
        assert set(chosen) < set(texts)
        assert chosen != texts[:4]
        assert not set(chosen) & {row["prompt"] for row in handful.rows["train"][:FIRST]}

    def test_it_is_no_larger_than_the_data(self, inputs, tmp_path):
        whole = Handful.of(inputs, tmp_path, 1000).handful()
        assert sorted(row["prompt"] for row in whole) == sorted(row["prompt"] for row in inputs.rows["train"])

    def test_it_has_held_out_rows_only_where_nothing_else_is_answered(self, inputs, handful, prepared, tmp_path):
        assert list(handful.rows) == ["train"]
        arguments = [f"--data.{split}={prepared[0]}/{file}.jsonl" for split, file in FILES.items()]
        alone = Inputs.open(parse_run("train", [*arguments, "--judges=[]", "--schedule=fusellm"]))
        assert list(Handful.of(alone, tmp_path, 4).rows) == ["train", "heldout"]

    def test_it_has_held_out_rows_where_a_file_has_the_other_answers_of_a_source(self, inputs, prepared, tmp_path):
        answers = tmp_path / "answers.jsonl"
        own = [{"prompt": row["prompt"], "response": "An answer."} for row in inputs.rows["train"]]
        answers.write_text("".join(json.dumps(row) + "\n" for row in own))
        guardian, *others = prepared[1].recipe.sources
        recipe = replace(prepared[1].recipe, sources=[replace(guardian, responses=str(answers)), *others])
        handful = Handful.of(Inputs.open(replace(prepared[1], recipe=recipe)), tmp_path / "store", 4)
        assert list(handful.rows) == ["train", "heldout"]
        assert handful.answers_of == {
            "guardian": ["heldout"],
            "scholar": ["train", "heldout"],
            "reckoner": ["train", "heldout"],
        }

    def test_it_has_two_of_the_largest_batches_but_no_more_than_a_shard(self):
        def of(*overrides: str) -> int:
            return default_count(parse_run("train", overrides).recipe)

        assert of() == 256  # which is a shard, and two batches of generation
        assert of("--capture.shard_size=4096", "--capture.batch_size=500") == 1000
        assert of("--capture.shard_size=4096", "--capture.batch_size=8", "--generation.batch_size=8") == 64
        assert of("--capture.shard_size=16") == 16


FILES = {"train": "fusion", "heldout": "heldout"}


class TestPreparation:
    AMOUNTS = Amounts(prompts=3, texts=2, all_texts=5, heldout=1.5, validation=0.5)

    def took(self, kind: layout.Kind, seconds: float, label: str = "work") -> Took:
        parts = [Part(0, [*range(FIRST)], ""), Part(1, [*range(FIRST, FIRST + 4)], "")]
        return Took(label, 7.0, [ShardTook(kind, part, s, 80) for part, s in zip(parts, (100.0, seconds), strict=True)])

    @pytest.mark.parametrize(
        ("kind", "factor"),
        [
            (layout.truth("train", "guardian"), 5),  # the texts of all splits
            (layout.scores("verifier"), 2),
            (layout.winners("guardian"), 2),
            (layout.targets("train"), 2 + 3 / 2),  # two modes in the training split, one in the others
        ],
        ids=lambda x: getattr(x, "folder", str(x)),
    )
    def test_the_handful_is_multiplied_and_loading_is_not(self, handful, kind, factor):
        line = probe.of_shards(self.took(kind, 2.0), handful, self.AMOUNTS)
        assert line is not None
        assert (line.phase, line.start, line.seconds, line.tokens) == ("prepare", 7.0, 2.0, 80)
        assert line.total == 7.0 + 2.0 * factor  # the 100 seconds of the first rows are in neither

    def test_answers_are_multiplied_by_the_batches_of_all_shards(self, handful, monkeypatch):
        kind = layout.responses("train", "guardian")
        monkeypatch.setattr(handful.recipe.generation, "batch_size", 2)
        # Shards of 5, 5 and 2 training prompts, and of 5 and 1 held-out ones; the handful has 4 prompts.
        assert probe.factor_of(kind, handful, self.AMOUNTS) == (3 + 3 + 1 + 3 + 1) / 2

    def test_other_engines_answer_prompt_by_prompt(self, handful, monkeypatch):
        monkeypatch.setitem(handful.engines, "guardian", "server")
        kind = layout.responses("train", "guardian")
        assert probe.factor_of(kind, handful, self.AMOUNTS) == 3 + 1.5
        monkeypatch.setattr(Handful, "responses_per_prompt", lambda self, split: 3)
        assert probe.factor_of(kind, handful, self.AMOUNTS) == 3 + 1.5 / 3

    def test_what_was_not_timed_has_no_line(self, handful):
        assert probe.of_shards(Took("work", 1.0, []), handful, self.AMOUNTS) is None


class TestTraining:
    STAGE = plan(parse_run("train", []).recipe, 788)[1]  # 200 steps of both modes
    AMOUNTS = Amounts(prompts=2, texts=3, all_texts=3, heldout=0, validation=0)

    def steps(self, *seconds: float):
        yield from ((s, 100) for s in seconds)

    def test_steps_are_multiplied_by_their_number_and_by_the_length_of_texts(self):
        line = of_steps(self.steps(50, 50, 1, 2, 3), 1, self.STAGE, self.AMOUNTS)
        assert (line.amount, line.seconds, line.tokens) == ("3 steps", 6, 300)
        assert line.total == pytest.approx(200 * 2 * 1.5)
        assert line.what == "stage 2, training and inference mode"

    @pytest.mark.parametrize(("each", "counted"), [(9.0, 3), (1.0, 5), (1e-3, 30)])
    def test_short_steps_are_timed_more_often(self, each, counted):
        line = of_steps(self.steps(*[each] * 100), 0, self.STAGE, self.AMOUNTS)
        assert line.amount == f"{counted} steps"

    def test_of_a_stage_with_a_single_step_that_one_counts(self):
        assert of_steps(self.steps(4.0), 0, self.STAGE, self.AMOUNTS).amount == "1 steps"

    def test_validations_are_those_of_a_run(self):
        stages = plan(parse_run("train", []).recipe, 788)  # which end after 200 and 400 steps
        assert probe.validations(stages, 100) == 5  # 0, 100, 200, 300, 400
        assert probe.validations(stages, 150) == 5  # 0, 150, 200, 300, 400
        assert probe.validations(stages, 0) == 3

    def test_a_handful_with_nothing_for_a_stage_is_refused(self, prepared):
        targets = Targets(prepared[2], "train")
        stages = plan(prepared[1].recipe, len(targets))
        check_modes(stages, targets)
        targets.modes[:] = 0
        with pytest.raises(ConfigError, match=r"--examples must be .* stage 1 \(inference mode\)"):
            check_modes(stages, targets)


class TestTable:
    LINES = (
        Timed("prepare", "open", start=1.5),
        Timed("prepare", "guardian: answer", "64 prompts", tokens=640, seconds=2.0, start=0.5, factor=10),
        Timed("train", "stage 1", "3 steps", tokens=300, seconds=3.0, factor=100),
    )

    def test_a_phase_is_the_sum_of_its_lines(self):
        lines = [re.split(r"  +", line.strip()) for line in probed(self.LINES)]
        assert lines[0] == ["time with one process here, by what was timed with the models themselves: 5 min"]
        assert ["prepare", "22.0 s"] in lines
        assert ["guardian: answer", "64 prompts in 2.00 s", "320", "0.50 s", "20.5 s"] in lines
        assert ["train", "5.0 min"] in lines

    def test_durations_have_three_digits(self):
        seconds = (0.254, 9.0, 41.26, 99.0, 100.0, 5999.0, 7200.0)
        assert [exactly(s) for s in seconds] == [
            "0.25 s", "9.00 s", "41.3 s", "99.0 s", "1.7 min", "100.0 min", "2.0 h",
        ]  # fmt: skip


class TestCommand:
    def test_every_source_and_phase_is_timed_and_nothing_is_kept(self, good, tmp_path, monkeypatch):
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        monkeypatch.setattr("tempfile.tempdir", None)
        found: list[Timed] = []
        monkeypatch.setattr("profuser.plan.plan.probe", lambda *given: found.extend(probe.probe(*given)) or found)
        with folder(good) as place:
            heldout = len(Path("heldout.jsonl").read_text().splitlines())
            before = {path: path.stat().st_mtime_ns for path in Path(place).rglob("*")}
            code, out, err = run("train", "--config", "recipe.yaml", "--dry-run", "--probe", "--examples", "4")
            assert {path: path.stat().st_mtime_ns for path in Path(place).rglob("*")} == before
        assert (code, err) == (0, "")
        assert not list(tmp_path.glob("profuser-*"))
        for source in ("guardian", "scholar"):
            for phase in ("score the ground truth", "answer the prompts", "capture the responses that won"):
                assert f"    {source}: {phase}  " in out
        said = ("verifier: score the responses", "align", "stage 1, training and inference mode")
        assert all(f"    {what}  " in out for what in (*said, "guardian: answer the held-out prompts"))
        assert "nothing of what was timed was kept" in out
        # The held-out ground truths are scored before and after fusion.
        scored = next(line for line in found if line.what == "score the held-out ground truths")
        assert scored.factor == pytest.approx(2 * heldout / (probe.FIRST + 4))
        assert "--probe" not in out.partition("commands:")[2]

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--probe"], "--probe must come with --dry-run"),
            (["--dry-run", "--examples", "9"], "--examples must come with --probe"),
            (["--dry-run", "--probe", "--tflops=9"], "--probe must stand without --tflops"),
            (["--dry-run", "--probe", "--device", "cpu"], "--probe must stand without --device"),
            (["--config", str(Path(probe.__file__).parent.parent / "recipes/paper-7b.yaml"), "--dry-run", "--probe"],
             "--probe must have all models on this machine, vicuna, llama-2, mpt, skywork, grm, qrm are not"),
        ],
    )  # fmt: skip
    def test_wrong_options_are_refused_in_one_line(self, arguments, says):
        code, _, err = run("train", *arguments)
        assert (code, err.count("\n"), says in err) == (2, 1, True), err

    def test_several_processes_do_not_time_at_once(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, _, err = run("train", "--dry-run", "--probe")
        assert (code, "--probe must run in one process, got 2" in err) == (2, True)


def test_characters_are_those_of_prompts_and_responses():
    assert characters(examples(3, 4)) == 7
    assert characters([]) == 1


@pytest.mark.parametrize(("signal", "line"), [(Interrupted, "interrupted"), (Terminated, "stopped by SIGTERM")])
def test_a_signal_says_that_nothing_is_kept(signal, line):
    with pytest.raises(signal, match=f"^{line}; nothing of what was timed is kept$"), nothing_kept():
        raise signal
