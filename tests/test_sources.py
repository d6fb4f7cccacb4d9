"""`profuser doctor --sources`: the kinship of models on disk, and the whole command, whose answers are made only once."""

from __future__ import annotations

import json
import os
import re
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from command_runs import folder, prepared_files, run
from conftest import ROOT
from safetensors.torch import load_file, save_file
from small_tokenizers import pretrained_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig

from profuser.doctor import heldout, kinship
from profuser.doctor.__main__ import arguments
from profuser.doctor.comparison import Comparison
from profuser.doctor.diversity import Outcome, combinations
from profuser.doctor.kinship import Moments, open_related
from profuser.doctor.recommend import recommend
from profuser.doctor.source_tables import describe_sources, notes_of, source_tables
from profuser.errors import DataError, Interrupted
from profuser.merge import blocks
from profuser.merge.weights import StoredWeights
from profuser.prepare import engines
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.store import processes

# --- kinship ----------------------------------------------------------------------------------------------------------


def model_of(folder: Path, tokenizer, **config) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(tokenizer), **(sizes | config))  # pyrefly: ignore[bad-argument-type]
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def changed(folder: Path, base: Path, change) -> str:
    """Writes a copy of a model in which every weight is `change(name, weight)`."""
    shutil.copytree(base, folder)
    weights = {name: change(name, tensor) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A base, and models that differ from it in ways of their own."""
    place = tmp_path_factory.mktemp("family")
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    base = place / "base"
    model_of(base, tokenizer)
    torch.manual_seed(1)
    shared = {name: 0.01 * torch.randn_like(w) for name, w in load_file(base / "model.safetensors").items()}
    found = {"base": str(base)}
    for name, scale in {"ann": 1.0, "ben": 0.5, "eve": -1.0}.items():
        found[name] = changed(
            place / name, base, lambda n, w, scale=scale: w + scale * shared[n] + 0.005 * torch.randn_like(w)
        )
    found["lone"] = changed(place / "lone", base, lambda n, w: w + 0.01 * torch.randn_like(w))
    found["other"] = changed(place / "other", base, lambda n, w: torch.randn_like(w) * w.std() if w.dim() > 1 else w)
    found["nan"] = changed(place / "nan", base, lambda n, w: w * float("nan") if n.endswith("norm.weight") else w)
    found["same"] = changed(place / "same", base, lambda n, w: w)
    found["bf16"] = changed(place / "bf16", base, lambda n, w: (w + shared[n]).bfloat16())
    model_of(place / "wide", tokenizer, intermediate_size=32)
    found["wide"] = str(place / "wide")
    return found


def relation(family, *names: str, base: str = "base", **options):
    sources = [SourceConfig(name=name, model=family[name], **options) for name in names]
    return kinship.kinship(open_related(family[base], sources))


def number(value: float | None) -> float:
    assert value is not None
    return value


def dense(family, name: str, base: str = "base") -> np.ndarray:
    """The delta of a model as one vector."""
    own, of_base = (
        {n: t.double() for n, t in load_file(f"{family[m]}/model.safetensors").items()} for m in (name, base)
    )
    return torch.cat([(own[n] - of_base[n]).reshape(-1) for n in sorted(of_base)]).numpy()


@pytest.mark.parametrize("block", [1 << 20, 100, 7])
def test_kinship_is_that_of_the_whole_deltas(family, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    names = ["ann", "eve", "lone", "bf16"] if block < 100 else ["ann", "ben", "eve", "lone", "other", "bf16"]
    found = relation(family, *names)
    deltas = {name: dense(family, name) for name in names}
    assert [(p.first, p.second) for p in found.pairs] == [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    for pair in found.pairs:
        a, b = deltas[pair.first], deltas[pair.second]
        assert pair.cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
        assert pair.pearson == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-12)
    kin = {(p.first, p.second): number(p.cosine) for p in found.pairs}
    assert kin["ann", "eve"] < -0.5
    assert abs(kin["ann", "lone"]) < 0.05
    assert kin["ann", "bf16"] > 0.8


def test_an_embedding_that_is_the_head_as_well_counts_once(tmp_path):
    base = tmp_path / "base"
    model_of(base, pretrained_tokenizer(resolve("demo:guardian")), tie_word_embeddings=True)
    found = {"base": str(base)}
    for name in ("ann", "ben"):
        found[name] = changed(tmp_path / name, base, lambda n, w: w + 0.01 * torch.randn_like(w))
    (pair,) = relation(found, "ann", "ben").pairs
    a, b = dense(found, "ann"), dense(found, "ben")
    assert number(pair.cosine) == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))


def test_the_same_delta_is_1_and_no_delta_has_no_kinship(family):
    found = relation(family, "ann", "same")
    (pair,) = found.pairs
    assert (pair.pearson, pair.cosine) == (None, None)
    assert found.change["same"] == 0
    assert found.least(["ann", "same"]) is None
    twice = [SourceConfig(name=name, model=family["ann"]) for name in ("one", "two")]
    (pair,) = kinship.kinship(open_related(family["base"], twice)).pairs
    assert pair.cosine == pytest.approx(1, abs=1e-12)
    assert pair.pearson == pytest.approx(1, abs=1e-12)


def test_a_mean_far_above_what_varies_cancels_nothing():
    rng = np.random.default_rng(0)
    a = rng.standard_normal(3000)
    b = 0.5 * a + rng.standard_normal(3000)
    moments = Moments(3)
    vectors = torch.from_numpy(np.stack([a + 1e6, b - 1e6, np.full(3000, 0.1)]))
    for block in vectors.split(700, dim=1):
        moments.add(block)
    assert kinship.ratio(moments.varying, 0, 1) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-8)
    assert kinship.ratio(moments.dot, 0, 1) == pytest.approx(-1)
    assert kinship.ratio(moments.varying, 0, 2) is None  # it is the same everywhere
    assert kinship.ratio(moments.dot, 0, 2) == pytest.approx(1)


def test_what_cannot_be_compared_says_why(family):
    sources = [
        SourceConfig(name="ann", model=family["ann"]),
        SourceConfig(name="wide", model=family["wide"]),
        SourceConfig(name="scholar", model="demo:scholar"),
        SourceConfig(name="pinned", model="org/model", revision="main"),
        SourceConfig(name="nan", model=family["nan"]),
        SourceConfig(name="ben", model=family["ben"]),
    ]
    found = kinship.kinship(open_related(family["base"], sources))
    assert [(p.first, p.second) for p in found.pairs] == [("ann", "ben")]
    a, b = dense(family, "ann"), dense(family, "ben")
    assert found.pairs[0].cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-12)
    assert set(found.apart) == {"wide", "scholar", "pinned", "nan"}
    assert "one architecture" in found.apart["wide"]
    assert "one vocabulary" in found.apart["scholar"]
    assert "revision" in found.apart["pinned"]
    assert "finite" in found.apart["nan"]
    assert all("\n" not in reason for reason in found.apart.values())
    alone = relation(family, "ann", "ben", base="wide")
    assert (alone.pairs, alone.change, set(alone.apart)) == ([], {}, {"ann", "ben"})


def test_a_base_that_is_no_ancestor_is_said_so_although_its_kinships_are_high(family):
    found = relation(family, "ann", "lone", base="other")
    assert number(found.pairs[0].cosine) > 0.5  # both deltas hold the same foreign weights
    assert found.strangers == ["ann", "lone"]
    assert found.least(["ann", "lone"]) is None
    assert len(notes_of(found)) == 2
    assert all("not what" in note and "\n" not in note for note in notes_of(found))
    true = relation(family, "ann", "ben")
    assert (true.strangers, notes_of(true)) == ([], [])
    assert true.least(["ann", "ben"]) == true.pairs[0].cosine
    assert number(true.pairs[0].cosine) > 0.5
    assert 0.2 < true.change["ann"] / 0.5 < 2  # 0.011 of noise on weights of 0.02


def test_tables_of_tokens_do_not_count_in_the_size_of_a_delta(family, tmp_path):
    def change(name, weight):
        return 10 * weight if "embed_tokens" in name or "lm_head" in name else weight

    large = family | {"large": changed(tmp_path / "large", Path(family["base"]), change)}
    assert relation(large, "large").change == {"large": 0.0}


def test_kinships_near_0_are_pointed_out(family):
    (note,) = notes_of(relation(family, "ann", "lone"))
    assert "near 0" in note
    assert notes_of(relation(family, "ann", "eve", "lone")) == []  # eve has learnt the opposite of ann


def test_added_tokens_are_compared_by_their_bytes(family, tmp_path):
    """The rows of a model whose tokens stand elsewhere are found by the tokens' bytes, as in a merge."""
    tokenizer = pretrained_tokenizer(resolve("demo:guardian"))
    tokenizer.add_tokens(["<|extra|>"], special_tokens=True)
    model = AutoModelForCausalLM.from_pretrained(family["ann"])
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 1, mean_resizing=False)
    model.save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    found = relation(family | {"more": str(tmp_path / "more")}, "ann", "more")
    assert found.apart == {}
    assert found.pairs[0].cosine == pytest.approx(1, abs=1e-9)


def test_a_base_with_a_weight_that_is_not_finite_is_refused(family):
    with pytest.raises(DataError, match="finite"):
        relation(family, "ann", base="nan")


def test_one_parameter_of_every_model_is_in_memory_at_a_time(family, monkeypatch):
    alive: set[int] = set()
    most = 0
    get = StoredWeights.get

    def counted(self, name):
        nonlocal most
        tensor = get(self, name)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    monkeypatch.setattr(StoredWeights, "get", counted)
    relation(family, "ann", "ben", "lone")
    assert most <= 2 * 4  # those of the parameter before are let go while the next are read


# --- the command ------------------------------------------------------------------------------------------------------

OPTIONS = ("--sources", "--config", "recipe.yaml")


@pytest.fixture
def no_model(monkeypatch):
    """Makes it an error to load a model."""

    def refused(source, *_):
        raise AssertionError(f"{source.name} is loaded")

    monkeypatch.setattr(heldout, "load_model", refused)


def compared(*options: str) -> tuple[dict, str]:
    code, out, err = run("doctor", *OPTIONS, "--json", *options)
    assert code == 0, err
    assert out.count("\n") == 1, "beside the JSON nothing is printed on stdout"
    return json.loads(out), err


@pytest.mark.usefixtures("no_model")
def test_the_answers_of_a_store_are_used_and_it_is_not_changed(good):
    with folder(good):
        before = prepared_files()
        found, err = compared()
        assert prepared_files() == before
        scores = json.loads(Path("runs/recipe/scores.json").read_text())
    assert err == ""
    assert {name: of["accuracy"] for name, of in found["sources"].items()} == scores["sources"]
    assert found["prompts"] == 3
    assert found["exhaustive"] is True
    assert sorted(s["sources"] for s in found["sets"]) == [["guardian"], ["guardian", "scholar"], ["scholar"]]
    assert found["kinship"] is None
    assert found["recommendation"]["method"] in ("fuse", "decode", "merge", "keep", "none")
    low, high = found["sources"]["guardian"]["interval"]
    assert 0 <= low <= found["sources"]["guardian"]["accuracy"]["mean"] <= high <= 1


def test_answers_are_made_once_and_are_those_of_a_store(good, monkeypatch):
    with folder(good):
        of_store, _ = compared()
        changed_recipe = ("--store", "elsewhere")
        made, err = compared(*changed_recipe)
        assert "guardian: answer the held-out prompts: 3/3" in err
        assert made == of_store
        assert not Path("elsewhere").exists()
        kept = sorted(Path("runs/recipe-sources").rglob("*.json"))
        assert len(kept) == 2

        # Nothing is loaded any more, also for a recipe with fewer sources, another target or another match.
        monkeypatch.setattr(heldout, "load_model", lambda *_: pytest.fail("a model is loaded"))
        again, err = compared(*changed_recipe)
        assert (again, err) == (made, "")
        one, _ = compared(
            *changed_recipe, "--sources", "[{name: scholar, model: 'demo:scholar'}]", "--target", "scholar"
        )
        assert list(one["sources"]) == ["scholar"]
        assert one["recommendation"]["method"] in ("keep", "none")
        compared(*changed_recipe, "--evaluation.match", "null")
        monkeypatch.undo()

        # What decides an answer makes it anew: the length of a response, and a file of the model.
        _, err = compared(*changed_recipe, "--generation.max_new_tokens", "5")
        assert "guardian: answer" in err
        assert "scholar: answer" in err
        Path("guardian/tokenizer_config.json").write_text(
            Path("guardian/tokenizer_config.json").read_text().replace("{", '{"a": 1,', 1)
        )
        _, err = compared(*changed_recipe)
        assert "guardian: answer" in err
        assert "scholar: answer" not in err


def test_an_interrupted_command_goes_on_and_a_damaged_file_is_made_again(good, monkeypatch):
    with folder(good):
        options = ("--store", "elsewhere", "--generation.batch_size", "1")
        whole, _ = compared(*options)
        shutil.rmtree("runs/recipe-sources")
        monkeypatch.setattr(heldout, "BATCHES", 1)
        generate, asked = engines.generate, []

        def stopping(model, chat, prompts, *rest, **options):
            if len(asked) == 2:
                raise Interrupted()
            asked.extend(prompts)
            return generate(model, chat, prompts, *rest, **options)

        monkeypatch.setattr(engines, "generate", stopping)
        code, _, err = run("doctor", *OPTIONS, *options)
        assert code == 130
        assert "goes on from there" in err
        files = sorted(Path("runs/recipe-sources").rglob("*"))
        assert [f.name for f in files if f.is_file()] == ["000000.json", "000001.json"]

        def counted(model, chat, prompts, *rest, **options):
            asked.extend(prompts)
            return generate(model, chat, prompts, *rest, **options)

        asked.clear()
        monkeypatch.setattr(engines, "generate", counted)
        assert compared(*options)[0] == whole
        assert len(asked) == 1 + 3  # guardian's last prompt, and scholar's three

        damaged = next(Path("runs/recipe-sources").glob("guardian-*/000001.json"))
        damaged.write_text(damaged.read_text().replace("[", '[\n  "made up",', 1))
        asked.clear()
        found, err = compared(*options)
        assert found == whole
        assert len(asked) == 1
        assert "is not what was written" in err

        # A file of another place is right in itself, and still not what was written there.
        files = sorted(Path("runs/recipe-sources").rglob("*.json"))
        assert len(files) == 6
        kept = [path.read_bytes() for path in files]
        for place, other in ((0, 1), (0, 3), (4, 1), (5, 3)):
            files[place].write_bytes(kept[other])
            asked.clear()
            found, err = compared(*options)
            assert (found, len(asked)) == (whole, 1)
            assert f"{files[place]} is not what was written" in err
            assert files[place].read_bytes() == kept[place]

        # What killed commands have left goes, and what another one writes stays.
        left, written = (
            files[0].with_name(f".{files[0].name}.{processes.place()}.{process}.tmp")
            for process in (2**22 + 1, os.getppid())
        )
        left.touch()
        written.touch()
        asked.clear()
        assert compared(*options)[0] == whole
        assert not asked
        assert written.exists()
        assert not left.exists()


@pytest.mark.usefixtures("no_model")
def test_training_data_and_judges_need_not_be_there_yet(good):
    with folder(good):
        Path("train.jsonl").unlink()
        found, _ = compared("--judges", "[]")
    assert found["prompts"] == 3


@pytest.mark.usefixtures("no_model")
def test_the_tables_say_what_the_json_says(good):
    with folder(good):
        found, _ = compared()
        code, out, err = run("doctor", *OPTIONS)
    assert (code, err) == (0, "")
    assert re.search(r"^guardian \+ scholar +\d\.\d{3} +\d+\.\d +\d\.\d{3} +\d+\.\d +\(", out, re.MULTILINE)
    for name, of_source in found["sources"].items():
        assert re.search(rf"^{name} .* {100 * of_source['accuracy']['mean']:.1f}  \(", out, re.MULTILINE)
    assert "3 held-out prompts are few" in out
    assert out.rstrip().splitlines()[-1] == found["recommendation"]["sentence"]


@pytest.mark.usefixtures("no_model")
def test_a_base_adds_the_kinship(good):
    with folder(good):
        shutil.copytree("guardian", "tuned")
        weights = load_file("guardian/model.safetensors")
        save_file({n: w * 1.01 for n, w in weights.items()}, "tuned/model.safetensors", metadata={"format": "pt"})
        found, _ = compared("--base", "tuned")
        code, out, _ = run("doctor", *OPTIONS, "--base", "tuned")
        assert code == 0
    assert found["kinship"]["base"] == "tuned"
    assert found["kinship"]["pairs"] == []
    assert found["kinship"]["change"] == {"guardian": pytest.approx(0.01, rel=0.1)}
    assert "one vocabulary" in found["kinship"]["not_comparable"]["scholar"]
    assert "scholar cannot be compared: models must have one vocabulary" in out


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--data.heldout", "null"), 2, "data.heldout must name"),
        (("--data.heldout", "missing.jsonl"), 3, "missing.jsonl"),
        (("--data.heldout", "blank.jsonl", "--evaluation.match", "null"), 3, "must hold a ground truth"),
        (("--evaluation.match", "no_such:match"), 2, "evaluation.match"),
        (("--base", "nowhere/at/all"), 3, "no such place"),
        (("--base", "train.jsonl"), 3, "train.jsonl"),
        (("--store", "guardian/damaged"), 3, "manifest.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
@pytest.mark.usefixtures("no_model")
def test_what_is_wrong_is_said_in_one_line_before_a_model_runs(good, options, code, says):
    with folder(good):
        rows = [json.loads(line) for line in Path("heldout.jsonl").read_text().splitlines()]
        Path("blank.jsonl").write_text("".join(json.dumps(row | {"response": ""}) + "\n" for row in rows))
        Path("guardian/damaged").mkdir()
        Path("guardian/damaged/manifest.json").write_text("[]")
        found, out, err = run("doctor", *OPTIONS, *options)
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert says in err


def test_rows_without_a_ground_truth_are_left_out(good):
    with folder(good):
        rows = [json.loads(line) for line in Path("heldout.jsonl").read_text().splitlines()]
        rows[1]["response"] = ""
        Path("heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        found, err = compared("--evaluation.match", "null")
        assert found["prompts"] == 2
        assert "2/2 prompts" in err  # the store is of other rows
        assert compared()[0]["prompts"] == 3  # a match of one's own needs no ground truth


def test_a_line_says_that_not_all_sets_of_many_sources_were_looked_at():
    names = [f"source{n}" for n in range(13)]
    right = np.random.default_rng(0).random((13, 60)) < 0.4
    outcome = Outcome.of(right, [["x"] * 60] * 13, ["all"] * 60)
    found = combinations(outcome)
    accuracy = {name: {"all": float(r.mean()), "mean": float(r.mean())} for name, r in zip(names, right)}
    comparison = Comparison("file", accuracy, outcome, found, None, recommend(outcome, found, names, None))
    text = source_tables(comparison)
    assert "of 13 sources not all sets were looked at (12 is the most for that)" in text
    assert f"and {len(found) - 13 - 10} more" in text
    assert "few" not in text
    assert describe_sources(comparison)["exhaustive"] is False


@pytest.mark.long
def test_the_demos_sources_are_best_fused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("doctor", "--sources", "--json")
    assert code == 0, err
    found = json.loads(out)
    page = (ROOT / "docs/sources.md").read_text()
    assert found["recommendation"]["method"] == "fuse"
    assert found["recommendation"]["sources"] == ["guardian", "scholar", "reckoner"]
    for of_set in (s for s in found["sets"] if len(s["sources"]) > 1):
        printed = re.search(
            rf"^{re.escape(' + '.join(of_set['sources']))} +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) ", page, re.MULTILINE
        )
        assert printed is not None
        numbers = [of_set["diversity"], 100 * of_set["plurality"], of_set["score"], 100 * of_set["oracle"]]
        assert [float(n) for n in printed.groups()] == pytest.approx(numbers, rel=0.03)  # another CPU rounds otherwise


@pytest.mark.parametrize(
    "argv",
    [
        ["--sources", "--tokenizers", "a", "b"],
        ["--sources", "--text", "f"],
        ["--sources", "--example", "1"],
        ["--base", "x", "--config", "r"],
        ["--base", "x"],
        [],
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments(argv)
    assert stop.value.code == 2
    assert "give " in capsys.readouterr().err


def test_the_recipes_key_of_the_same_name_can_still_be_set():
    args, overrides = arguments(["--config", "r", "--sources", "[{name: a, model: b}]", "--seed", "1"])
    assert not args.sources
    assert sorted(overrides) == sorted(["--seed", "1", "--sources=[{name: a, model: b}]"])
    args, overrides = arguments(["--sources", "--sources=[]", "--base", "x"])
    assert (args.sources, args.base, overrides) == (True, "x", ["--sources=[]"])
    assert arguments(["--sources"])[0].config is None  # the bundled demo


def test_the_page_names_what_the_command_prints():
    page = (ROOT / "docs/sources.md").read_text().lower()
    for word in ("diversity", "plurality", "score", "oracle", "pearson", "cosine", "fuse", "decode", "merge", "keep"):
        assert word in page
