"""Recipes: what a correct one may say, and how a wrong one is refused."""

import copy
import os
import sys

import pytest
import yaml

from profuser.errors import ConfigError
from profuser.recipe.compare import deciding_keys, differing_keys
from profuser.recipe.data import DataConfig, DataLocation
from profuser.recipe.generation import SourceGenerationConfig
from profuser.recipe.parse import load_recipe, parse_run
from profuser.recipe.places import RECIPES_DIR, is_path, load_function, resolve
from profuser.recipe.schema import Recipe, SourceConfig
from profuser.recipe.server import ServerConfig
from profuser.report.scores import has_heldout
from profuser.train.run_directory import differing_runs

MINIMAL = {"sources": [{"name": "a", "model": "demo:guardian"}], "target": "a", "data": {"train": "demo:fusion.jsonl"}}


def parse(tmp_path, recipe, *argv):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return parse_run("train", ["--config", str(path), *argv], {"fresh": "start over"}, "")


def test_no_arguments_mean_the_bundled_demo():
    run = parse_run("train", [], {}, "")
    assert run.name == "demo"
    assert str(run.output_dir) == "runs/demo"
    assert str(run.store_dir) == "runs/demo-store"


def test_a_recipe_takes_its_name_from_the_file_and_overrides_from_the_line(tmp_path):
    run = parse(tmp_path, MINIMAL, "--optim.lr", "0.5", "--schedule", "sft", "--fresh")
    assert (run.name, run.recipe.optim.lr, run.recipe.schedule, run.options) == ("mine", 0.5, "sft", {"fresh": True})


def test_a_list_or_place_of_its_own_replaces_the_recipes_whole(tmp_path):
    """What a new value does not say has its default, even if the value that it replaces says it."""
    recipe = {
        "sources": [{"name": "a", "model": "demo:guardian", "reasoning": "strip", "chat_template": "x"}],
        "target": "a",
        "data": {"train": {"path": "ds", "config": "main", "split": "sft"}, "prompt_column": "q"},
        "judges": [{"name": "j", "function": "m:f", "floor": 0.5}],
        "schedule": [{"inference_weight": 1.0, "share": 2.0}],
        "optim": {"lr": 0.5},
    }
    new = {
        "sources": [{"name": "a", "model": "./other"}],
        "data": {"train": {"path": "other"}},
        "judges": [{"name": "k", "model": "./rm"}],
        "schedule": [{"training_weight": 1.0}],
        "optim": {"epochs": 2.0},
    }
    words = [
        word for key, value in new.items() for word in (f"--{key}", yaml.safe_dump(value, default_flow_style=True))
    ]
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump(new))
    for argv in (words, [f"--config={second}"]):
        run = parse(tmp_path, recipe, *argv)
        assert run.name == "mine"
        found = run.recipe.to_dict()
        expected = load_recipe(copy.deepcopy(MINIMAL | new | {"optim": {"lr": 0.5, "epochs": 2.0}})).to_dict()
        # Groups of keys are added to, and so is what a single key names.
        assert found == expected | {"data": expected["data"] | {"prompt_column": "q"}}
    assert parse(tmp_path, recipe, "--data.train.path", "other").recipe.data.train == DataLocation(
        path="other", config="main", split="sft"
    )


def test_stages_can_be_spelt_out(tmp_path):
    recipe = MINIMAL | {"schedule": [{"inference_weight": 1.0}, {"training_weight": 1.0, "share": 2.0}]}
    schedule = parse(tmp_path, recipe).recipe.schedule
    assert isinstance(schedule, list)
    assert [stage.share for stage in schedule] == [1.0, 2.0]


@pytest.mark.parametrize("recipe", sorted(RECIPES_DIR.glob("*.yaml")), ids=lambda p: p.name)
def test_every_bundled_recipe_parses(recipe):
    assert parse_run("train", ["--config", str(recipe)], {}, "").recipe.sources


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bogus": 1}, "bogus"),
        ({"data": {"train": "x", "tarin": "y"}}, "tarin"),
        ({"sources": [{"name": "a", "model": "m", "modell": "n"}]}, "modell"),
        ({"optim": {"lr": "fast"}}, "optim.lr"),
        ({"optim": {"steps": 0}}, "optim.steps"),
        ({"optim": {"steps": 10**23}}, "optim.steps must be >= 1 and below 2**53"),
        ({"optim": {"batch_size": 0}}, "optim.batch_size"),
        ({"optim": {"temperature": 2.0}}, "renormalize"),
        ({"optim": {"divergence": "kl"}}, "optim.divergence"),
        ({"optim": {"divergence": "jsd", "divergence_beta": 2.0}}, r"optim.divergence_beta must be in [0, 1]"),
        ({"optim": {"divergence": "skew_kl", "divergence_beta": 1.0}}, r"optim.divergence_beta must be in [0, 1)"),
        ({"optim": {"divergence": "reverse_kl", "tail": "renormalize"}}, "is infinite with tail='renormalize'"),
        ({"optim": {"divergence_beta": 0.1}}, "optim.divergence_beta is for divergence: jsd, skew_kl, skew_reverse_kl"),
        ({"optim": {"combine": "mean"}}, "optim.combine"),
        ({"optim": {"combine_temperature": 0.5}}, "optim.combine_temperature is for combine: softmax"),
        ({"optim": {"combine": "softmax", "combine_temperature": 0.0}}, "optim.combine_temperature"),
        ({"optim": {"z_loss": -1.0}}, "optim.z_loss"),
        ({"optim": {"label_smoothing": 1.0}}, "optim.label_smoothing must be < 1"),
        ({"optim": {"left_out": 1.0}}, "optim.left_out must be < 1"),
        ({"optim": {"left_out": -0.1}}, "optim.left_out must be >= 0"),
        ({"schedule": "progresive"}, "schedule"),
        ({"schedule": []}, "at least one stage"),
        ({"schedule": [{"share": 1.0}]}, "inference_weight or training_weight"),
        ({"schedule": [{"training_weight": float("nan")}]}, "schedule[0].training_weight must be >= 0"),
        ({"schedule": [{"inference_weight": float("inf")}]}, "schedule[0].inference_weight must be >= 0"),
        ({"judges": [{"name": "j", "model": "m", "batch_size": 0}]}, "judges: j: batch_size must be > 0, got 0"),
        ({"decode": {"seed": -1}}, "decode.seed must be >= 0"),
        ({"data": {"train": "x", "response_column": "prompt"}}, "must differ, got 'prompt' as both"),
        ({"sources": []}, "at least one model"),
        ({"sources": [{"name": "a", "model": "m"}, {"name": "a", "model": "n"}]}, "'a' twice"),
        ({"sources": [{"name": "../a", "model": "m"}]}, "'../a'"),
        ({"target": "b"}, "sources: a"),
        ({"judges": [{"name": "j"}]}, "must have one of model, function, grader, server and scores"),
        ({"align": {"min_reliability": 3.0}}, "min_reliability"),
        ({"sources": [{"name": "fused", "model": "m"}]}, "'fused'"),
        ({"generation": {"responses_per_source": 2}}, "temperature"),
        ({"optim": {"beta": -1.0}}, "optim.beta"),
        ({"optim": {"betas": [1.5, 0.9]}}, "optim.betas"),
        ({"optim": {"log_every": 0}}, "optim.log_every"),
        ({"seed": -1}, "seed"),
        ({"adapter": {"rank": 0}}, "adapter.rank must be > 0"),
        ({"adapter": {"target_modules": []}}, "adapter.target_modules must have a name"),
        ({"sources": [{"name": "a", "model": "m", "generation": {"top_p": 0.0}}]}, "sources: a: generation.top_p"),
        ({"date": "31.7.2026"}, "date must be a date such as"),
    ],
)
def test_a_wrong_recipe_names_the_key(tmp_path, change, expected):
    with pytest.raises(ConfigError) as error:
        parse(tmp_path, MINIMAL | change)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert "Subtypes" not in str(error.value)  # jsonargparse's words for a group that may be null


@pytest.mark.parametrize(
    ("stage", "new"),
    [({"infer_weight": 1.0}, "inference_weight"), ({"train_weight": 1.0}, "training_weight")],
)
def test_an_old_spelling_names_the_new_one(tmp_path, stage, new):
    with pytest.raises(ConfigError, match=f"{next(iter(stage))} is now called {new}"):
        parse(tmp_path, MINIMAL | {"schedule": [stage]})


def refusal(tmp_path, recipe, *argv) -> str:
    with pytest.raises(ConfigError) as error:
        parse(tmp_path, recipe, *argv)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "got", "meant"),
    [
        ({"dta": {"train": "x"}}, "a key of the recipe must be one of sources, ", "got dta; did you mean data?"),
        ({"lr": 1e-3}, "a key of the recipe", "got lr; did you mean optim.lr?"),
        (
            {"optim": {"lerning_rate": 1}},
            "a key of optim must be one of lr, ",
            "got lerning_rate; did you mean optim.lr?",
        ),
        ({"optim": {"warmup": 1}}, "a key of optim", "did you mean optim.warmup_ratio?"),
        ({"generation": {"top_k": 5}}, "a key of generation", "did you mean generation.top_p or capture.top_k?"),
        (
            {"data": {"train": "x", "batch_size": 1}},
            "a key of data",
            "capture.batch_size or optim.batch_size or decode.batch_size?",
        ),
        (
            {"data": {"train": "x", "heldout": {"path": "y", "spilt": "test"}}},
            "a key of data.heldout",
            "data.heldout.split?",
        ),
        ({"judges": [{"name": "j", "functoin": "f"}]}, "a key of judges[0]", "did you mean judges[0].function?"),
        ({"optm.lr": 1}, "a key of the recipe", "got optm; did you mean optim.lr?"),
        ({7: 1}, "a key of the recipe", "got 7"),
    ],
)
def test_an_unknown_key_is_blamed_itself_with_what_was_meant(tmp_path, change, got, meant):
    message = refusal(tmp_path, MINIMAL | change)
    assert got in message
    assert meant in message


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--lr", "1"), "got lr; did you mean --optim.lr?"),
        (("--optm.lr=1",), "got optm; did you mean --optim.lr?"),
        (("--optim.lrr", "1"), "a key of optim must be one of lr, "),
        (("--learning-rate", "1"), "did you mean --optim.lr?"),
        (
            ("--batch_size", "1"),
            "did you mean --generation.batch_size or --capture.batch_size or --optim.batch_size or --decode.batch_size?",
        ),
        (("--optim.warmup", "1"), "got warmup; did you mean --optim.warmup_ratio?"),  # no key is shortened silently
        (("--fres",), "got fres; did you mean --fresh?"),
        (("--fresh=1",), "--fresh must stand alone"),
        (("--optim.lr",), "--optim.lr must have a value behind it"),
        (("--optim.lr", "--seed", "1"), "--optim.lr must have a value behind it"),
        (("--optim.lr.x", "1"), "optim.lr must be a value"),
        (("--sources.name", "x"), "sources must be a value without keys of its own"),
        (("--optim.betas", "0.8", "0.9"), "got 0.9; "),
        (("--sources+", "{name: b, modle: c}"), "got modle; did you mean sources[0].model?"),
        (("--optim", "{lrr: 1}"), "got lrr; did you mean optim.lr?"),
        (("--seed", "-1"), "seed must be >= 0"),
        (("--seed", "2024-13-01"), "seed must be int, got 2024-13-01"),
    ],
)
def test_an_argument_that_no_command_takes_is_blamed_itself(tmp_path, argv, said):
    assert said in refusal(tmp_path, MINIMAL, *argv)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sources": [{"name": 7, "model": "m"}]}, "sources[0].name must be str, got 7; put quotes around it"),
        (
            {"sources": [{"name": "a", "model": "m"}, {"name": False, "model": "m"}]},
            "sources[1].name must be str, got false",
        ),
        ({"sources": [{"name": "a"}]}, "sources[0] must have the key model"),
        ({"sources": ["a"]}, "sources[0] must be a mapping of its keys (name, model"),
        ({"sources": {"name": "a", "model": "m"}}, "sources must be a list of mappings, got {"),
        ({"target": 7}, "target must be str, got 7; put quotes around it"),
        (
            {"data": {"train": 7}},
            "data.train must be str or a list of str or a mapping of its keys (path, config, split), got 7",
        ),
        ({"data": {"train": {"split": "test"}}}, "data.train must have the key path"),
        ({"optim": {"lr": None}}, "optim.lr must be float, got null"),
        ({"optim": None}, "optim must be a mapping of its keys"),
        ({"optim": {"steps": True}}, "optim.steps must be int or null, got true"),
        ({"optim": {"steps": 1.5}}, "optim.steps must be int or null, got 1.5"),
        ({"optim": {"betas": [0.9]}}, "optim.betas must be a list of 2 numbers, got [0.9]"),
        (
            {"optim": {"precision": "bf61"}},
            "optim.precision must be one of auto, fp32, bf16, got bf61; did you mean bf16?",
        ),
        ({"schedule": [{"training_weight": 1}, {"share": "half"}]}, "schedule[1].share must be float, got half"),
        ({"schedule": {"share": 1}}, "schedule must be one of progressive, "),
        ({"optim": {"lr": "two\nlines"}}, "optim.lr must be float, got two lines"),
        ({"two\nlines": 1}, "got two lines"),
    ],
)
def test_a_value_of_the_wrong_type_is_blamed_by_its_place(tmp_path, change, said):
    assert said in refusal(tmp_path, MINIMAL | change)


def test_what_jsonargparse_takes_is_taken(tmp_path):
    spelt = {"steps": "3", "lr": "1e-4", "betas": ["0.8", 0.9], "gradient_checkpointing": "true"}
    optim = parse(tmp_path, MINIMAL | {"optim": spelt}, "--optim.epochs=2").recipe.optim
    assert (optim.steps, optim.lr, optim.betas, optim.gradient_checkpointing, optim.epochs) == (
        3,
        1e-4,
        (0.8, 0.9),
        True,
        2,
    )
    recipe = parse(tmp_path, MINIMAL | {"optim.lr": 2}, "--target", "7", "--sources+", "{name: '7', model: m}").recipe
    assert (recipe.optim.lr, recipe.target, len(recipe.sources)) == (2, "7", 2)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    """PyYAML would keep the last of the two and drop the first silently."""
    path = tmp_path / "mine.yaml"
    for twice in ("optim: { lr: 1, lr: 2 }\n", "seed: 1\nseed: 1\n", "data: { train: y }\n"):
        path.write_text(yaml.safe_dump(MINIMAL) + twice)
        with pytest.raises(ConfigError, match=r"the key (lr|seed|data) a second time in one mapping in line \d+"):
            parse_run("train", ["--config", str(path)])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"# caf\xe9\n", "line 9 has the byte 0xe9, which is not UTF-8"),
        (b'store: "x\\ud83d"\n', r"store must be Unicode, it has \ud83d"),
        (b'store: "a\\0b"\n', r"store must be without the character NUL, got a\0b; leave it out"),
        (b"seed: 2024-13-01\n", "must be YAML, got: month must be in 1..12"),
        (b"seed: [1\n", "in line 10"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named_with_the_line(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    path.write_bytes(yaml.safe_dump(MINIMAL).encode() + b"\n# \xc3\xa9\n" + content)
    with pytest.raises(ConfigError) as error:
        parse_run("train", ["--config", str(path)])
    assert said in str(error.value)


@pytest.mark.parametrize("place", ["pipe", "folder", "/dev/zero", "/dev/null", "none"])
def test_a_recipe_that_is_no_file_is_refused_and_not_waited_for(tmp_path, place):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"^--config must be an existing recipe, got "):
        parse_run("train", ["--config", str(tmp_path / place)])


def test_a_recipe_of_an_absurd_size_is_not_read(tmp_path):
    with open(tmp_path / "large.yaml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="it has 1,099,511,627,776 bytes"):
        parse_run("train", ["--config", str(tmp_path / "large.yaml")])


def test_a_recipe_may_be_utf8_with_a_mark_but_not_utf16(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + yaml.safe_dump(MINIMAL).encode())
    assert parse_run("train", ["--config", str(path)]).recipe.target == "a"
    path.write_bytes(yaml.safe_dump(MINIMAL).encode("utf-16"))
    with pytest.raises(ConfigError, match="iconv -f UTF-16"):
        parse_run("train", ["--config", str(path)])


@pytest.mark.parametrize("key", ["store", "output"])
def test_a_folder_of_the_data_has_neither_the_store_nor_the_run_in_it(tmp_path, key):
    """The next start would take their files for data."""
    (tmp_path / "set").mkdir()
    recipe = MINIMAL | {"data": {"train": str(tmp_path / "set")}, key: str(tmp_path / "set" / ".." / "set" / "made")}
    with pytest.raises(ConfigError, match=rf"^{key} must lie outside of the data's folders, got [^\n]*"):
        parse(tmp_path, recipe).check_places()
    parse(tmp_path, recipe, f"--{key}={tmp_path / 'set-made'}").check_places()
    parse(tmp_path, recipe, "--data.train=.").check_places()  # which is refused when it is read


def test_a_split_may_name_a_place_in_a_data_set(tmp_path):
    heldout = {"path": "org/set", "config": "main", "split": "test"}
    run = parse(tmp_path, MINIMAL | {"data": {"train": "org/set", "heldout": heldout}}, "--data.validation.path=v")
    data = run.recipe.data
    assert (str(data.location("train")), str(data.location("heldout"))) == (
        "org/set",
        "org/set (config main, split test)",
    )
    assert data.validation == "v"  # a mapping that says nothing but the path is the path
    assert load_recipe(run.recipe.to_dict()) == run.recipe
    assert parse(tmp_path, MINIMAL, "--data.heldout", "{path: x, split: y}").recipe.data.heldout == DataLocation(
        path="x", split="y"
    )


@pytest.mark.parametrize("missing", ["sources", "target", "data"])
def test_a_recipe_without_a_needed_key_says_which(tmp_path, missing):
    recipe = {k: v for k, v in MINIMAL.items() if k != missing}
    with pytest.raises(ConfigError, match=missing):
        parse(tmp_path, recipe)


def test_a_bundled_name_stays_inside_the_demo():
    with pytest.raises(ConfigError, match="inside"):
        resolve("demo:../../setup.py")


def test_what_looks_like_a_path_is_never_a_hub_id():
    assert all(map(is_path, ("./m", "/m", "~/m", "../m", "a/b/c", "demo:guardian")))
    assert not is_path("org/model")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("fine:g", "has no attribute 'g'); fix the name"),
        ("fine.f", "fix the name, or run where the module lies"),
        ("./fine.py:f", "write fine:f and run where the file lies"),
        ("fine.py:f", "write fine:f and run where the file lies"),
        ("nowhere:f", "fix the name, or run where the module lies"),
        ("needy:f", "(No module named 'nowhere_at_all'); install nowhere_at_all"),
        ("broken:f", "(broken.py, line 2)); fix the module"),
        ("latin:f", "(latin.py, line 2)); fix the module"),
        ("leaving:f", "fix the module"),
        ("fine:x", "must be a function"),
    ],
)
def test_a_function_that_cannot_be_loaded_says_what_to_fix(tmp_path, monkeypatch, path, said):
    monkeypatch.syspath_prepend(tmp_path)
    modules = {
        "fine": b"x = 1\ndef f(): ...\n",
        "needy": b"import nowhere_at_all\n",
        "broken": b"x = 1\ndef f(:\n",
        "latin": b"x = 1\ny = 'caf\xe9'\n",
        "leaving": b"import sys\nsys.exit(0)\n",
    }
    for name, code in modules.items():
        (tmp_path / f"{name}.py").write_bytes(code)
        sys.modules.pop(name, None)
    with pytest.raises(ConfigError) as error:
        load_function(path, "evaluation.match")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_differing_keys_are_dotted_and_see_through_tuples():
    assert differing_keys({"a": {"b": (1, 2), "c": 1}}, {"a": {"b": [1, 2], "c": 2}, "d": 3}) == ["a.c", "d"]


def test_the_record_of_a_run_is_read_and_left_as_it_is(tmp_path):
    recipe = parse(
        tmp_path, MINIMAL | {"data": {"train": ["a.jsonl", "b.jsonl"], "heldout": {"path": ["x", "y"], "split": "t"}}}
    ).recipe
    record = recipe.to_dict()
    assert load_recipe(record) == load_recipe(record) == recipe
    assert record == recipe.to_dict()


def test_a_record_with_a_value_that_a_group_refuses_is_blamed_in_one_line(tmp_path):
    record = parse(tmp_path, MINIMAL).recipe.to_dict() | {"adapter": {"rank": 0}}
    with pytest.raises(ConfigError, match=r"^adapter\.rank must be > 0[^\n]*$"):
        load_recipe(record)


def test_a_run_that_was_begun_before_a_key_existed_has_its_default(tmp_path):
    """Its record lacks the key, which must not make it another run. One that has another value is another run."""
    new = {"recipe": parse(tmp_path, MINIMAL).recipe.to_dict(), "store": "s"}
    old = copy.deepcopy(new)
    for key in ("heldout_share", "validation_share", "messages_column", "turns", "drop_duplicates"):
        del old["recipe"]["data"][key]
    del old["recipe"]["judging"], old["recipe"]["sources"][0]["responses"]
    assert differing_runs(old, new) == []
    other = {"recipe": parse(tmp_path, MINIMAL, "--data.turns=all").recipe.to_dict(), "store": "s"}
    assert differing_runs(old, other) == ["data.turns"]
    unknown = copy.deepcopy(old)
    unknown["recipe"]["optim"]["momentum"] = 0.9  # a key that there is no longer
    assert "optim.momentum" in differing_runs(unknown, new)


def test_a_share_of_the_data_is_a_split_as_others_are(tmp_path):
    shares = MINIMAL | {"data": {"train": "demo:fusion.jsonl", "heldout_share": 0.1, "validation_share": 0.1}}
    recipe = parse(tmp_path, shares, "--optim.export=best").recipe
    assert has_heldout({"recipe": recipe.to_dict()})
    assert not has_heldout({"recipe": parse(tmp_path, MINIMAL).recipe.to_dict()})
    assert has_heldout({"recipe": parse(tmp_path, MINIMAL, "--data.heldout=demo:heldout.jsonl").recipe.to_dict()})


def test_two_scores_never_have_one_column(tmp_path):
    """The audit table calls a score by the judge and the source."""
    recipe = MINIMAL | {
        "sources": [{"name": name, "model": "demo:guardian"} for name in ("a", "b_a")],
        "judges": [{"name": name, "function": "m:f"} for name in ("j", "j_b")],
    }
    with pytest.raises(ConfigError, match="score_j_b_a twice"):
        parse(tmp_path, recipe)


def test_where_a_source_runs_may_change_before_a_run_is_resumed():
    """Not so what it is: another model, another name of a server's model, or another temperature make another run."""

    def recipe(**source) -> dict:
        server = {"url": "http://a:1/v1", "model": "m"} | source.pop("server", {})
        generation = {"temperature": 0.0} | source.pop("generation", {})
        first = SourceConfig(
            name="a", model="a", server=ServerConfig(**server), device_map=source.pop("device_map", None)
        )
        second = SourceConfig(name="b", model=source.pop("model", "b"), generation=SourceGenerationConfig(**generation))
        assert not source
        return Recipe(sources=[first, second], target="b", data=DataConfig(train="x.jsonl")).to_dict()

    for free in (
        {"server": {"url": "http://b:2/v1", "key_variable": "KEY", "concurrency": 1, "timeout": 1.0, "retries": 0}},
        {"device_map": "auto"},
        {"generation": {"batch_size": 3, "engine": "transformers"}},
    ):
        assert deciding_keys(recipe(), recipe(**free)) == []
    bare = recipe(generation={"temperature": None})
    assert deciding_keys(bare, recipe(generation={"temperature": None, "batch_size": 3})) == []
    bare["sources"][1]["generation"] = None
    assert deciding_keys(bare, recipe(generation={"temperature": None, "batch_size": 3})) == []
    for decisive in ({"server": {"model": "n"}}, {"model": "c"}, {"generation": {"temperature": 0.5}}):
        assert deciding_keys(recipe(), recipe(**decisive)) == ["sources"]
