"""The experiment that fuses sums: its task, its tokenizers, how it measures the length of numbers, and a tiny run of it."""

from __future__ import annotations

import itertools
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from profuser.demo.verify import answer_of, exact_match
from profuser.errors import ConfigError, ProfuserError
from profuser.experiments import number_fusion, number_lengths, sums
from profuser.experiments.page import write_section
from profuser.text.chat import ChatFormat
from profuser.typed import read_json


def test_a_worked_answer_adds_column_by_column():
    problem = sums.Sum(1347, 58, swapped=True)
    assert problem.prompt == "1347+58=?"
    assert problem.worked == "58+1347. 8+7=15. 50+40+15=105. 300+105=405. 1000+405=1405. Answer: 1405."
    assert problem.terse == "Answer: 1405."
    assert sums.Sum(705, 90, swapped=False).worked == "705+90. 5+0=5. 0+90+5=95. 700+95=795. Answer: 795."


def test_every_step_of_a_worked_answer_holds_and_a_slip_is_one_wrong_step_that_is_kept():
    rng = random.Random(0)
    for _ in range(300):
        problem = sums.drawn(rng)
        assert exact_match(sums.row_of(problem), problem.worked)
        for made, mistakes in ((problem, 0), (sums.slipped(problem, rng), 1)):
            steps = re.findall(r"([\d+]+)=(\d+)\.", made.worked)
            assert sum(sum(map(int, added.split("+"))) != int(total) for added, total in steps) == mistakes
            assert (
                (answer_of(made.worked) != problem.answer)
                == bool(mistakes)
                == (answer_of(made.terse) != problem.answer)
            )


def test_the_splits_share_no_two_numbers_and_have_the_asked_flaws():
    made = sums.Sums(200, 50, terse=0.4, wrong=0.1)
    reserved = [problem.key for problem in (*made.fusion, *made.heldout)]
    assert len(set(reserved)) == 250
    drawn = list(itertools.islice(made.pretraining(random.Random(1)), 2000))
    assert not {problem.key for problem in drawn} & set(reserved)
    rows = made.fusion_rows()
    assert sum(row["response"].startswith("Answer:") for row in rows) == 80
    assert sum(answer_of(row["response"]) != row["answer"] for row in rows) == 20


def test_the_tokenizers_differ_in_numbers_only():
    single, triple = (sums.tokenizer_of(name) for name in ("single", "triple"))
    text = "58+1347. 8+7=15. Answer: 1405."
    assert [t for t in single.tokenize(text) if t.isdecimal()] == list("58134787151405")
    assert [t for t in triple.tokenize(text) if t.isdecimal()] == ["58", "134", "7", "8", "7", "15", "140", "5"]
    assert [t for t in single.tokenize(text) if not t.isdecimal()] == [
        t for t in triple.tokenize(text) if not t.isdecimal()
    ]
    assert sum(t.isdecimal() for t in triple.get_vocab() if t.isascii()) == 1110


class Toy:
    """A model whose probabilities depend on the text of its tokens. Of the numbers it writes four tokens only."""

    names = ("7", "12", "345", "0", ".", "A")

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids = tokenizer.convert_tokens_to_ids(list(self.names))

    def row(self, ids: list[int]) -> np.ndarray:
        return np.random.default_rng(ids).dirichlet(np.ones(len(self.names)))

    def __call__(self, input_ids, attention_mask):
        logits = torch.full((*input_ids.shape, len(self.tokenizer)), -torch.inf)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            size = sum(mask)
            logits[row, size - 1, self.ids] = torch.from_numpy(np.log(self.row(ids[:size]))).float()
        return SimpleNamespace(logits=logits)


def test_lengths_of_numbers_are_those_of_all_texts(monkeypatch):
    toy = Toy(sums.tokenizer_of("triple"))
    chat: ChatFormat = SimpleNamespace(tokenizer=toy.tokenizer)  # pyrefly: ignore[bad-assignment]
    places = [[5], [6, 7, 8]]
    monkeypatch.setattr(number_lengths, "BATCH", 3)
    monkeypatch.setattr(number_lengths, "LONGEST", 4)
    monkeypatch.setattr(number_lengths, "FLOOR", 1e-9)
    found = number_lengths.number_lengths(toy, chat, places)  # pyrefly: ignore[bad-argument-type]
    true = np.zeros((2, number_lengths.LONGEST + 1))
    for place, before in enumerate(places):
        # The model may write every text of so many tokens. What matters is where its number ends.
        for path in itertools.product(range(len(toy.names)), repeat=number_lengths.LONGEST):
            mass, ids = 1.0, list(before)
            for n in path:
                mass *= toy.row(ids)[n]
                ids.append(toy.ids[n])
            digits = len("".join(itertools.takewhile(str.isdecimal, (toy.names[n] for n in path))))
            true[place, min(digits, number_lengths.LONGEST)] += mass
    assert found == pytest.approx(true, abs=1e-5)

    # With draws it is so on average.
    monkeypatch.setattr(number_lengths, "FLOOR", 0.2)
    many = number_lengths.number_lengths(toy, chat, places * 400)  # pyrefly: ignore[bad-argument-type]
    assert many[::2].std(0).max() > 0.01
    assert many.reshape(400, 2, -1).mean(0) == pytest.approx(true, abs=0.015)


def test_lengths_are_compared_with_the_truth():
    said = np.array([[0.2, 0.2, 0.0, 0.6, 0.0, 0.0], [0.0, 0.0, 0.5, 0.0, 0.0, 0.5]])
    true = np.array([[0.0, 0.0, 1.0, 0.0, 0.0], [0.0, 0.5, 0.0, 0.5, 0.0]])
    assert number_lengths.against(said, true) == pytest.approx(
        {
            "right": (0.6 + 0.5) / 2,
            "bias": ((0.25 * 1 + 0.75 * 3 - 3) + (0.5 * 2 + 0.5 * 5 - 3)) / 2,
            "shorter": 0.2 / 2,
            "longer": 0.5 / 2,
            "none": 0.2 / 2,
        }
    )


def test_places_are_where_numbers_begin():
    problem = sums.Sum(1347, 58, swapped=True)
    for name in ("single", "triple"):
        chat = ChatFormat(sums.tokenizer_of(name))
        texts = [str(chat.tokenizer.decode(ids)) for ids in number_fusion.places_of(chat, problem)]
        assert texts[0].endswith("assistant\n")
        assert texts[1].endswith("1000+405=1405. Answer: ")
        assert texts[2].endswith("assistant\nAnswer: ")
    assert number_fusion.true_lengths(problem).tolist() == [[0, 0.5, 0, 0.5, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]


def test_arms_need_a_checkout_and_a_name_of_their_own(tmp_path):
    here = number_fusion.HERE
    arms = number_fusion.arms_of([f"before={here}"], [["five", "capture.top_k=5"]])
    assert arms[-2].checkout == here
    assert arms[-1].options == ("--capture.top_k=5",)
    for bad in (str(here), f"before={tmp_path}"):
        with pytest.raises(ConfigError, match="--variant must be NAME=DIR"):
            number_fusion.arms_of([bad], [])
    with pytest.raises(ConfigError, match="'SFT' twice"):
        number_fusion.arms_of([f"SFT={here}"], [])


def test_an_arm_runs_the_code_of_its_checkout(tmp_path):
    (tmp_path / "checkout" / "profuser").mkdir(parents=True)
    (tmp_path / "checkout" / "profuser" / "__init__.py").write_text("raise RuntimeError('an old version')")
    arm = number_fusion.arms_of([f"old={tmp_path / 'checkout'}"], [])[-1]
    with pytest.raises(ProfuserError, match=r"(?s)the arm old failed with .*an old version"):
        number_fusion.fuse(arm, tmp_path / "recipe.yaml", tmp_path, [0])


@pytest.mark.long
def test_a_tiny_run(tmp_path, monkeypatch):
    monkeypatch.setattr(number_fusion, "DIRECTIONS", {"one → several": ("single", "triple")})
    trained = {name: sums.Training(steps=2, batch_size=4) for name in ("single", "triple")}
    settings = number_fusion.Settings(
        fusion=8, heldout=4, measured=2, sources=trained, targets=trained, steps=2, batch_size=4
    )
    output = tmp_path / "runs"
    (arm,) = number_fusion.arms_of([], [["k 5", "capture.top_k=5"]])[3:]
    results = number_fusion.experiment([arm], settings, [0], output, 1)
    found = results["directions"]["one → several"]
    assert set(found["models"]) == {"target before", "source"}
    figures = found["arms"]["k 5"][0]
    assert 0.0 < figures["bits"] < 10.0
    assert set(figures["lengths"]) == set(number_fusion.PLACES)
    run = read_json(output / "single-triple" / "k-5" / "0" / "run.json")
    assert run["recipe"]["capture"]["top_k"] == 5

    # The page shows every model, and what is finished is not done again.
    page = tmp_path / "page.md"
    page.write_text("<!-- number_fusion: begin -->\n<!-- number_fusion: end -->\n")
    write_section(page, number_fusion.SECTION, number_fusion.section(results, "command"))
    for name in ("target before", "source", "k 5"):
        assert f"| {name} | " in page.read_text()
    monkeypatch.setattr(number_fusion, "FUSE", "raise RuntimeError")
    assert number_fusion.experiment([arm], settings, [0], output, 1)["directions"] == results["directions"]
    with pytest.raises(ConfigError, match="begun with these settings"):
        number_fusion.experiment([arm], number_fusion.Settings(), [0], output, 1)
