"""Every kind of bad input gets its exit code and one line with rule, value and fix; nothing that was prepared is lost.

    python tests/test_bad_input.py > docs/bad_input.md

This runs the same cases and writes them as a table.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from command_runs import STORE, folder, make_good, prepared_files, rows, run, write_rows
from safetensors.torch import load_file, save_file

from profuser.recipe.places import resolve

NEW = ("--store", "new")


@dataclass
class Case:
    """One bad input: how a good folder is changed, which command runs, its exit code, and what its line must say."""

    what: str
    code: int
    says: tuple[str, ...]
    edit: Callable[[], object] = lambda: None
    arguments: tuple[str, ...] = ()
    command: str = "train"
    long: bool = False


def replace(path: str, old: str, new: str) -> Callable[[], object]:
    def edit() -> None:
        text = Path(path).read_text()
        assert old in text
        Path(path).write_text(text.replace(old, new))

    return edit


def truncate(pattern: str) -> Callable[[], object]:
    """An edit that cuts a file to half its size."""

    def edit() -> None:
        path = sorted(Path().glob(pattern))[0]
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return edit


def corrupt(pattern: str) -> Callable[[], object]:
    """An edit that inverts the first bytes of a file."""

    def edit() -> None:
        path = sorted(Path().glob(pattern))[0]
        data = bytearray(path.read_bytes())
        data[:16] = bytes(b ^ 0xFF for b in data[:16])
        path.write_bytes(data)

    return edit


def without_template() -> None:
    for file in Path("guardian").glob("chat_template*"):
        file.unlink()
    path = Path("guardian/tokenizer_config.json")
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))


def rename_column(old: str, new: str) -> Callable[[], object]:
    return replace("train.jsonl", f'"{old}":', f'"{new}":')


def change_weights(change: Callable) -> Callable[[], object]:
    """An edit of the folder's own model. `change(name, tensor)` gives the new tensor, or None to leave the tensor out."""

    def edit() -> None:
        path = "guardian/model.safetensors"
        weights = {name: change(name, tensor) for name, tensor in load_file(path).items()}
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path, {"format": "pt"})

    return edit


def larger_tokenizer() -> None:
    path = Path("guardian/tokenizer.json")
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"]["overmuch"] = 9999
    path.write_text(json.dumps(tokenizer))


def csv_with_a_cell_too_many() -> None:
    Path("train.csv").write_text("prompt,response\nHi,Answer: x.\nHo,Answer: y.,z\n")


def judge_that_exits() -> None:
    Path("leaving.py").write_text("import sys\n\ndef score(example, responses):\n    sys.exit(0)\n")
    replace("recipe.yaml", "profuser.demo.verify:score", "leaving:score")()


def judge_of_half_the_responses() -> None:
    Path("halving.py").write_text("def score(example, responses):\n    return [1.0] * (len(responses) // 2)\n")
    replace("recipe.yaml", "profuser.demo.verify:score", "halving:score")()


def match_in_latin1() -> None:
    Path("latin.py").write_bytes("def right(example, response):\n    return 'caf\xe9' in response\n".encode("latin-1"))
    replace("recipe.yaml", "profuser.demo.verify:exact_match", "latin:right")()


def template_in_latin1() -> None:
    Path("chat.jinja").write_bytes("{# caf\xe9 #}".encode("latin-1"))
    replace("recipe.yaml", "./guardian }", "./guardian, chat_template: chat.jinja }")()


def recipe_in_latin1() -> None:
    Path("recipe.yaml").write_bytes(Path("recipe.yaml").read_bytes() + "# caf\xe9\n".encode("latin-1"))


def half_a_character_as_skill() -> None:
    content = rows("fusion", 6)
    write_rows("train.jsonl", [*content[:5], {**content[5], "skill": "\ud83d"}])


def alpaca() -> None:
    content = [{"instruction": "Add.", "input": "1 2", "output": "3"}]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def conversations() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "f"}, {"from": "gpt", "value": "Ho"}]
    Path("train.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")


def folder_of_two_splits() -> None:
    Path("set").mkdir()
    for name, split in (("fusion", "train"), ("heldout", "test")):
        write_rows(f"set/{split}.jsonl", rows(name, 3))


def sentencepiece_alone() -> None:
    Path("guardian/tokenizer.json").unlink()
    Path("guardian/tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")


def no_heldout_truth() -> None:
    write_rows("heldout.jsonl", [{**row, "response": ""} for row in rows("heldout", 3)])
    replace("recipe.yaml", 'evaluation: { match: "profuser.demo.verify:exact_match" }', "")()


def judge_without_template() -> None:
    shutil.copytree(resolve("demo:judge-a"), "judge-a")
    Path("judge-a/chat_template.jinja").unlink()
    replace("recipe.yaml", "judges: [", "judges: [{ name: rm, model: ./judge-a }, ")()


def two_gguf_files() -> None:
    Path("guardian/config.json").unlink()
    for name in ("a.gguf", "b.gguf"):
        (Path("guardian") / name).write_bytes(b"GGUF")


def part_of_a_gguf() -> None:
    Path("guardian/config.json").unlink()
    Path("guardian/m-00001-of-00002.gguf").write_bytes(b"GGUF")


def gguf_that_is_cut_off() -> None:
    Path("guardian/config.json").unlink()
    Path("guardian/m.gguf").write_bytes(b"GGUF\x03\0\0\0")


def absurd_tokenizer() -> None:
    with open("guardian/tokenizer.json", "ab") as file:
        file.truncate(1 << 33)  # zeros that take no room on the disk


CASES = [
    Case("an unknown key on the command line", 2, ("optim", "lr, ", "got speed", "--help"), arguments=("--optim.speed", "9")),
    Case("an unknown key in the recipe", 2, ("optim", "lr, ", "got lerning_rate"), replace("recipe.yaml", "lr:", "lerning_rate:")),
    Case("a misspelt group", 2, ("a key of the recipe", "got dta", "did you mean data?"), replace("recipe.yaml", "data:", "dta:")),
    Case("a key without its group", 2, ("got lr", "did you mean --optim.lr?"), arguments=("--lr", "1")),
    Case("a key of a list's entry", 2, ("sources[1]", "got modle", "did you mean sources[1].model?"), replace("recipe.yaml", "scholar, model:", "scholar, modle:")),
    Case("a key that stands twice", 2, ("optim a second time", "line"), lambda: Path("recipe.yaml").write_text(Path("recipe.yaml").read_text() + "optim: { steps: 3 }\n")),
    Case("a name that YAML reads as a number", 2, ("sources[1].name must be str, got 7", "quotes"), replace("recipe.yaml", "name: scholar", "name: 7")),
    Case("a recipe that is not UTF-8", 2, ("recipe.yaml", "line 12", "0xe9"), recipe_in_latin1),
    Case("a wrong type", 2, ("optim.steps must be int or null, got many",), arguments=("--optim.steps", "many")),
    Case("an unknown schedule", 2, ("schedule", "progressive", "slow"), arguments=("--schedule", "slow")),
    Case("a recipe that does not exist", 2, ("--config", "other.yaml"), arguments=("--config", "other.yaml")),
    Case("a recipe that is no YAML", 2, ("recipe.yaml",), replace("recipe.yaml", "target: guardian", "target: [guardian")),
    Case("no source", 2, ("sources", "empty"), arguments=("--sources", "[]")),
    Case(
        "more sources than a token has bits for", 2, ("sources", "63", "64"),
        arguments=("--sources", f"[{', '.join(f'{{name: s{n}, model: demo:guardian}}' for n in range(64))}]"),
    ),
    Case("a target that is no source and no model", 2, ("target", "guardain", "guardian, scholar"), arguments=("--target", "guardain")),
    Case("a stage without weights", 2, ("schedule[0]", "inference_weight", "training_weight"), arguments=("--schedule", "[{share: 1}]")),
    Case("a stage that turns KD round", 2, ("schedule[0].beta", "-5"), arguments=("--schedule", "[{training_weight: 1, beta: -5}]")),
    Case("a recipe that is a list", 2, ("mapping", "list"), lambda: Path("recipe.yaml").write_text("- a\n")),
    Case("a group that is no mapping", 2, ("optim", "mapping"), replace("recipe.yaml", "optim: { steps: 2, batch_size: 4, lr: 1.0e-3 }", "optim: 1")),
    Case("an inference mode without judges", 2, ("judges", "fusellm"), arguments=("--judges", "[]")),
    Case("a judge that cannot be imported", 2, ("verifier", "no_such_module"), replace("recipe.yaml", "profuser.demo.verify:score", "no_such_module:score")),
    Case("a temperature that the tail forbids", 2, ("optim.temperature", "tail", "renormalize"), arguments=("--optim.temperature", "2")),
    Case("a negative number", 2, ("optim.lr", "> 0", "-1"), arguments=("--optim.lr", "-1")),
    Case("other settings than the store's", 2, ("capture.top_k", "--fresh"), arguments=("--capture.top_k", "3")),
    Case("other settings than the run's", 2, ("optim.lr", "--output", "--fresh"), arguments=("--optim.lr", "1", "--output", "runs/recipe")),
    Case("a judge that fails", 3, ("verifier", "AttributeError", "fix the function"), replace("recipe.yaml", "demo.verify:score", "demo.verify:exact_match"), NEW),
    Case("a judge that ends the process", 3, ("verifier", "SystemExit", "fix the function"), judge_that_exits, NEW),
    Case("a judge that scores too few responses", 3, ("verifier", "1 numbers for 2 responses", "fix the function"), judge_of_half_the_responses, NEW),
    Case("a match in a file that is not UTF-8", 2, ("evaluation.match", "latin", "utf-8"), match_in_latin1),
    Case("a judge without a chat template", 3, ("judge rm", "chat_template"), judge_without_template, NEW),
    Case("a floor that is no number", 2, ("judges: verifier: floor", "nan"), replace("recipe.yaml", 'verify:score" }', 'verify:score", floor: .nan }')),
    Case("a match that fails", 3, ("evaluation.match", "TypeError", "fix the function"), replace("recipe.yaml", "verify:exact_match", "verify:answer_of")),
    Case("a match that gives no truth value", 3, ("evaluation.match", "True or False"), replace("recipe.yaml", "profuser.demo.verify:exact_match", "operator:concat")),
    Case("held-out data without any ground truth", 3, ("heldout.jsonl", "evaluation.match"), no_heldout_truth, NEW),
    Case("a model directory that does not exist", 3, ("scholar", "./nowhere"), replace("recipe.yaml", "demo:scholar", "./nowhere")),
    Case("a revision of a local model", 3, ("guardian", "revision", "Hub"), replace("recipe.yaml", "./guardian }", "./guardian, revision: v1 }"), NEW),
    Case("a bundled model that does not exist", 3, ("demo:scolar", "guardian, "), replace("recipe.yaml", "demo:scholar", "demo:scolar")),
    Case("a data file that does not exist", 3, ("missing.jsonl",), arguments=("--data.train", "missing.jsonl")),
    Case("a column that is missing", 3, ("prompt and response", "prompt, output, skill", "data.response_column"), rename_column("response", "output")),
    Case("a column that is misnamed", 3, ("'question'", "prompt, response, skill"), arguments=("--data.prompt_column", "question")),
    Case("a skill column that is misnamed", 3, ("'topic'", "data.skill_column", "prompt, response, skill"), arguments=("--data.skill_column", "topic")),
    Case("a conversation with the call of a function", 3, ("train.jsonl", "row 0", "'conversations'", "'function_call'"), conversations),
    Case("Alpaca's columns, named without the input", 3, ("train.jsonl", "'input'", "row 0"), alpaca, ("--data.prompt_column", "instruction", "--data.response_column", "output")),
    Case("held-out data in a folder of two splits", 3, ("data.heldout", "train, test", "{ path: set, split: test }"), folder_of_two_splits, ("--data.heldout", "set")),
    Case("a split that is not there", 3, ("data.heldout", "train, test", "got tset"), folder_of_two_splits, ("--data.heldout", "{ path: set, split: tset }")),
    Case("half a character in the skill column", 3, ("train.jsonl", "row 5", "'skill'", "ud83d"), half_a_character_as_skill),
    Case("a column that holds no text", 3, ("'prompt'", "row 0", "list"), replace("train.jsonl", '"prompt": "', '"prompt": ["x"], "was": "')),
    Case("a data file that is cut off", 3, ("train.jsonl",), truncate("train.jsonl")),
    Case("a data file without a row", 3, ("train.jsonl", "row"), lambda: Path("train.jsonl").write_text("")),
    Case("a data file that is not UTF-8", 3, ("train.jsonl", "utf-8"), lambda: Path("train.jsonl").write_bytes('{"prompt": "café", "response": "x"}'.encode("latin-1"))),
    Case("a CSV row with a cell too many", 3, ("train.csv", "row 3 has 3 cells"), csv_with_a_cell_too_many, ("--data.train", "train.csv")),
    Case("a model that lacks a weight", 3, ("guardian", "every weight", "model.layers.0"), change_weights(lambda name, tensor: None if "layers.0.mlp.up" in name else tensor), NEW),
    Case("a model whose configuration is of half of it", 3, ("guardian", "have no place", "number of layers"), replace("guardian/config.json", '"num_hidden_layers": 4', '"num_hidden_layers": 2'), NEW),
    Case("a model whose configuration gives other shapes", 3, ("guardian", "shapes", "[128, 256] and not [128, 128]"), replace("guardian/config.json", '"intermediate_size": 256', '"intermediate_size": 128'), NEW),
    Case("a generation config that cannot be read", 3, ("guardian", "generation_config.json", "delete it"), truncate("guardian/generation_config.json"), NEW),
    Case("a model with weights that are not finite", 3, ("finite",), change_weights(lambda name, tensor: tensor * float("nan")), NEW),
    Case("a tokenizer larger than its model", 3, ("guardian", "an embedding for every token", "the id 9999"), larger_tokenizer, NEW),
    Case("a model's truncated safetensors", 3, ("guardian", "download"), truncate("guardian/model.safetensors"), NEW),
    Case("a model's corrupt safetensors", 3, ("guardian", "download"), corrupt("guardian/model.safetensors"), NEW),
    Case("a model without weights", 3, ("guardian", "download"), lambda: Path("guardian/model.safetensors").unlink(), NEW),
    Case("a broken tokenizer", 3, ("guardian", "tokenizer"), truncate("guardian/tokenizer.json"), NEW),
    Case("a tokenizer without a chat template", 3, ("guardian", "chat_template"), without_template, NEW),
    Case("a chat template that is not UTF-8", 3, ("guardian", "chat.jinja", "line 1", "0xe9"), template_in_latin1, NEW),
    Case("a tokenizer.model without sentencepiece", 3, ("guardian", "pip install sentencepiece protobuf"), sentencepiece_alone, NEW),
    Case("a directory with two GGUF files", 3, ("a.gguf, ", "b.gguf"), two_gguf_files, NEW),
    Case("a part of a GGUF file", 3, ("llama-gguf-split --merge",), part_of_a_gguf, NEW),
    Case("a GGUF file that is cut off", 3, ("guardian", "GGUF", "cut off"), gguf_that_is_cut_off, NEW),
    Case("a tokenizer of an absurd size", 3, ("guardian", "tokenizer.json", "at most 256 MiB"), absurd_tokenizer, NEW),
    Case("a tokenizer that the store does not belong to", 3, ("sources.guardian.files", "--fresh"), replace("guardian/tokenizer_config.json", "{", '{"a": 1,')),
    Case("a chat template that the store does not belong to", 3, ("sources.guardian.template", "--fresh"), replace("recipe.yaml", "./guardian }", './guardian, chat_template: "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}" }')),
    Case("another directory as the store", 3, ("guardian", "manifest.json", "--store"), arguments=("--store", "guardian")),
    Case("a broken manifest", 3, ("manifest.json", "--fresh"), truncate(f"{STORE}/manifest.json")),
    Case("a manifest of something else", 3, ("manifest.json", "a mapping, got []", "--fresh"), lambda: Path(f"{STORE}/manifest.json").write_text("[]")),
    Case("a truncated shard, where it cannot be built again", 3, ("sha256", "profuser.prepare"), truncate(f"{STORE}/targets/heldout-*"), ("runs/recipe",), "evaluate"),
    Case("a corrupt shard, where it cannot be built again", 3, ("sha256", "profuser.prepare"), corrupt(f"{STORE}/truth/heldout-scholar-*"), ("runs/recipe",), "evaluate"),
    Case("a benchmark without a model", 2, ("--tasks", "--models"), arguments=("--tasks", "demo"), command="evaluate"),
    Case("a benchmark of log-likelihoods for models that answer together", 2, ("bits_per_byte:recipe.yaml", "decode:recipe.yaml"), arguments=("--models", "decode:recipe.yaml", "--tasks", "bits_per_byte:recipe.yaml"), command="evaluate"),
    Case("a model that is not there, for a benchmark", 3, ("./missing", "fix the path"), arguments=("--models", "./missing", "--tasks", "demo"), command="evaluate"),
    Case("a task that is not there", 2, ("demo_knowlege", "did you mean demo_knowledge?"), arguments=("--models", "demo:guardian", "--tasks", "demo_knowlege"), command="evaluate", long=True),
    Case("new data that is not there, for a finished run", 3, ("missing.jsonl",), arguments=("runs/recipe", "--data", "missing.jsonl"), command="evaluate"),
    Case("another model that is not there, for a finished run", 3, ("./missing", "fix the path"), arguments=("runs/recipe", "--data", "heldout.jsonl", "--models", "./missing"), command="evaluate"),
    Case("models without anything to score them on", 2, ("--models", "--data"), arguments=("runs/recipe", "--models", "guardian"), command="evaluate"),
    Case("a run directory of something else", 3, ("run.json", "--output"), arguments=("--output", "guardian")),
]  # fmt: skip


def run_case(case: Case) -> tuple[int, str, str]:
    if case.command == "evaluate":
        return run(case.command, *case.arguments)
    # The run gets a directory of its own unless the case is about that: in the finished run's, the command would end at once.
    given = (("--config", "recipe.yaml"), ("--store", STORE), ("--output", "other"))
    return run(case.command, *(a for pair in given if pair[0] not in case.arguments for a in pair), *case.arguments)


@pytest.fixture(autouse=True)
def without_sentencepiece(monkeypatch):
    """The advice about a tokenizer.model is given where the packages are missing, which they are after a plain installation."""
    monkeypatch.setattr("profuser.models.load.is_installed", lambda module: module == "gguf")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.long if case.long or n % 3 else (), id=case.what.replace(" ", "-"))
        for n, case in enumerate(CASES)
    ],
)
def test_bad_input_ends_in_its_exit_code_with_one_line(good, case, monkeypatch):
    with folder(good):
        monkeypatch.syspath_prepend(Path.cwd())  # as `python -m` does
        case.edit()
        before = prepared_files()
        code, _, err = run_case(case)
        lines = [line for line in err.splitlines() if line.strip()]
        assert (code, len(lines)) == (case.code, 1), err
        assert lines[0].startswith("error: ")
        for part in case.says:
            assert part in lines[0]
        assert prepared_files() == before, "something that was prepared or trained is lost"


def test_a_damaged_shard_is_built_again_and_nothing_else_is(good):
    with folder(good):
        shutil.rmtree("runs/recipe")
        whole = prepared_files()
        corrupt(f"{STORE}/truth/train-scholar-*")()
        code, out, err = run("train", "--config", "recipe.yaml")
        assert code == 0, err
        assert "damaged or missing: building it again" in out
        after = prepared_files()
        assert {n for n in whole if after[n] != whole[n]} <= {
            f"{STORE}/{n}" for n in ("manifest.json", "summary.json", "samples.parquet")
        }


def odd_rows() -> list[dict]:
    """Rows with everything that is handled and not refused."""
    normal = rows("fusion", 6)
    return [
        *normal,
        {**normal[0], "response": ""},
        {**normal[0], "prompt": "Say it again. " * 60},
        {**normal[0], "response": "One more word. " * 60},
        {**normal[0], "prompt": "What does <|im_end|> mean?", "response": "It ends </s> a turn."},
        {**normal[0], "response": unicodedata.normalize("NFD", "Answer: caf\u00e9.")},
    ]


HANDLED = (
    "1 x empty response, skipped",
    "1 x over-long, skipped",
    "1 x over-long response, cut without an end of turn",
    "1 x control token spelt out in a text, kept as text",
    "1 x text that a normaliser changes, skipped",
)


def nfc_normaliser() -> None:
    """Gives the folder's own model a tokenizer that composes characters."""
    path = Path("guardian/tokenizer.json")
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "NFC"}
    path.write_text(json.dumps(tokenizer))


def run_odd() -> tuple[int, str, str]:
    nfc_normaliser()
    write_rows("train.jsonl", odd_rows())
    return run("train", "--config", "recipe.yaml", "--store", "odd-store", "--output", "odd")


def handled_line(out: str) -> str:
    lines = [line for line in out.splitlines() if line.startswith("handled: ")]
    assert len(lines) == 1, out
    return lines[0]


def test_odd_examples_are_handled_and_summed_up_in_one_line(good):
    with folder(good):
        code, out, err = run_odd()
        assert code == 0, err
        line = handled_line(out)
        for part in HANDLED:
            assert part in line
        assert re.search(r"fused model: odd\n", out)


def main() -> None:
    print(
        "# Bad input\n\nEvery line below was printed by the command; `python tests/test_bad_input.py > docs/bad_input.md` "
        "writes this page, and `tests/test_bad_input.py` tests the same cases.\n\n| input | exit | what is printed |\n|---|---:|---|"
    )
    with tempfile.TemporaryDirectory() as place:
        make_good(Path(place))
        for case in CASES:
            with folder(Path(place)):
                sys.path[0] = str(Path.cwd())  # as `python -m` does
                case.edit()
                code, _, err = run_case(case)
                print(f"| {case.what} | {code} | `{err.strip().replace('|', chr(92) + '|')}` |")
        with folder(Path(place)):
            code, out, _ = run_odd()
            print(f"| examples that are handled, and counted at the end | {code} | `{handled_line(out)}` |")


if __name__ == "__main__":
    main()
