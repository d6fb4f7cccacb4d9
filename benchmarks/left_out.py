"""What `left_out` costs in exactness and saves in time, on the states of a language model (SmolLM2, say) over real text.

    python -m benchmarks.left_out errors --model DIR [--rows 2048] [--write docs/results.md]
    python -m benchmarks.left_out times --model DIR [--rows 8192] [--rounds 3] [--case uneven --share 0.02] [--write docs/results.md]

`errors` compares the gradients with the exact ones, for chunks of several sizes and for every divergence. `times` measures, on one
thread and in turn, the three matrix products alone, the exact loss, the loss with `left_out`, and the chunk loop that one would write
by hand. It takes the time of the processor, because others may share the machine. The source is the model itself at a temperature of
0.7, with ten entries.
Dimension letters: N rows, D hidden, V vocabulary, K kept entries.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.cases import make_case
from benchmarks.implementations import arguments, chunked
from benchmarks.measure import gemms, surroundings
from profuser.cli import main_of
from profuser.experiments.page import write_section
from profuser.experiments.real_model import table
from profuser.kernels.divergences import DIVERGENCES
from profuser.kernels.left_out import ThinnedProducts
from profuser.loss import fused_linear_fusion_loss

ROOT = Path(__file__).parent.parent
WINDOW = 512
"""How many tokens of a text the model sees at a time."""
ENTRIES = 10
SURER = 0.7
TABLE = ((256, 0.01), (256, 0.003), (256, 0.001), (128, 0.003), (512, 0.003), (1024, 0.003))
"""Rows of a chunk, and the share that is left out."""
SHARE, CHUNK = 0.003, 256

Case = dict[str, Any]


def texts() -> Iterator[str]:
    """English, German and code, and then this project's pages."""
    names = [f"profuser/experiments/texts/{name}.txt" for name in ("en", "de", "code")]
    for path in [*(ROOT / name for name in names), ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]:
        yield path.read_text(encoding="utf-8")


def real_case(model_dir: str, rows: int) -> Case:
    """The arguments of the loss for the first `rows` tokens of the texts, whose first three take turns."""
    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    windows = [tokenizer(text, return_tensors="pt").input_ids[0].split(WINDOW + 1) for text in texts()]
    whole = [[window for window in of_text if len(window) == WINDOW + 1] for of_text in windows]
    turns = [w for turn in itertools.zip_longest(*whole[:3]) for w in turn if w is not None]
    tokens = torch.stack([*turns, *itertools.chain(*whole[3:])][: -(-rows // WINDOW)])
    head = model.lm_head.weight.detach()
    with torch.no_grad():
        hidden = torch.cat([model.model(window[None, :-1]).last_hidden_state[0] for window in tokens])[:rows]
        found = [((part @ head.t()) / SURER).log_softmax(1).topk(ENTRIES) for part in hidden.split(WINDOW)]
    return {
        "hidden": hidden.requires_grad_(),
        "weight": head.clone().requires_grad_(),
        "labels": tokens[:, 1:].flatten()[:rows],
        "source_ids": torch.cat([each.indices for each in found])[None].int(),
        "source_logprobs": torch.cat([each.values for each in found])[None],
    }


def gradients(case: Case, **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    loss, stats = fused_linear_fusion_loss(**case, **options, return_stats=True)
    dhidden, dweight = torch.autograd.grad(loss, (case["hidden"], case["weight"]))
    return dhidden, dweight, stats


def relative(found: Tensor, true: Tensor) -> float:
    return ((found - true).norm() / true.norm()).item()


def without_stand_ins(self: ThinnedProducts) -> None:
    self.stand_ins, self.shares = [], []


def error_row(label: str, case: Case, exact: tuple[Tensor, Tensor], **options: Any) -> list[str]:
    dhidden, dweight, stats = gradients(case, **options)
    with mock.patch.object(ThinnedProducts, "multiply_stand_ins", without_stand_ins):
        bare, _, _ = gradients(case, **options)
    error = (dhidden - exact[0]).norm()
    bound = f"{stats['hidden_error_bound'] / error:.1f}" if error > 0 else ""
    return [
        label,
        str(options["chunk_size"]),
        f"{options['left_out']:g}",
        f"{100 * stats['kept_share']:.1f} %",
        f"{relative(dhidden, exact[0]):.1e}",
        f"{relative(dweight, exact[1]):.1e}",
        f"{relative(bare, exact[0]):.1e}",
        bound,
    ]


def rounded_to_bf16(case: Case, exact: Tensor) -> float:
    """The error of hidden's gradient if the exact gradient in the logits is rounded to bf16, for cross-entropy."""
    hidden, weight, labels = (case[name].detach() for name in ("hidden", "weight", "labels"))
    parts = []
    for h, gold in zip(hidden.split(WINDOW), labels.split(WINDOW)):
        g = (h @ weight.t()).softmax(1)
        g[torch.arange(len(g)), gold] -= 1
        parts.append(g.bfloat16().float() @ weight / len(labels))
    return relative(torch.cat(parts), exact)


def errors(case: Case) -> str:
    cross_entropy = arguments(case, "cross-entropy")
    exact = gradients(cross_entropy)[:2]
    rows = [error_row("CE", cross_entropy, exact, chunk_size=chunk, left_out=share) for chunk, share in TABLE]
    rounding = rounded_to_bf16(cross_entropy, exact[0])
    for divergence in DIVERGENCES:
        exact = gradients(case, beta=1.0, divergence=divergence)[:2]
        options = {"beta": 1.0, "divergence": divergence, "chunk_size": CHUNK, "left_out": SHARE}
        rows.append(error_row(f"CE + {divergence}", case, exact, **options))
    head = [
        "loss",
        "chunk",
        "left out",
        "columns kept",
        "error of dH",
        "of dW",
        "dH without the stand-in",
        "bound / error",
    ]
    N, D, V = *case["hidden"].shape, len(case["weight"])
    return f"{N} x {D} x {V}; rounding the gradient in the logits to bf16 costs {rounding:.1e} of dH.\n\n{table(head, rows)}"


def times(cases: dict[str, Callable[[], Case]], rounds: int, share: float) -> str:
    rows = []
    for name, make in cases.items():
        case = make()
        (N, D), V = case["hidden"].shape, len(case["weight"])
        by_hand = arguments(case, "one source") | {"tail": "renormalize"}
        steps: dict[str, Callable[[], Any]] = {
            "three products": gemms(N, D, V, 3, torch.float32, "cpu"),
            "exact": lambda case=by_hand: step(fused_linear_fusion_loss, case),
            "chunk loop by hand": lambda case=by_hand: step(chunked, case),
            f"left_out={share}": lambda case=by_hand: step(fused_linear_fusion_loss, case, left_out=share),
        }
        seconds, results = measured(steps, rounds)
        exact, found = results["exact"], results[f"left_out={share}"]
        _, stats = fused_linear_fusion_loss(**by_hand, left_out=share, return_stats=True)
        floor = seconds["three products"]
        for label, taken in seconds.items():
            thin = label.startswith("left_out")
            rows.append([
                f"{name}, {N} x {D} x {V}",
                label,
                f"{statistics.median(taken):.2f}",
                f"{statistics.median(a / b for a, b in zip(taken, floor)):.2f}",
                f"{min(a / b for a, b in zip(taken, floor)):.2f}–{max(a / b for a, b in zip(taken, floor)):.2f}",
                f"{100 * stats['kept_share']:.1f} %" if thin else "",
                *(f"{relative(a, b):.1e}" if thin else "" for a, b in zip(found, exact)),
            ])  # fmt: skip
    head = ["case", "", "median s", "× three products", "least–most", "columns kept", "error of dH", "of dW"]
    return table(head, rows)


def step(function: Callable[..., Tensor], case: Case, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(**case, **options), (case["hidden"], case["weight"]))


def measured(steps: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The processor's seconds for each step, round by round, so that all meet the same load of the machine; and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, run in steps.items():
            results.pop(name, None)
            begin = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - begin)
    return seconds, results


def uneven(case: Case) -> Case:
    """The case with a logit of its own for each column, of standard deviation 3 and the same in all rows, as words have theirs."""
    hidden, weight = case["hidden"].detach(), case["weight"].detach()
    spread = 3.0
    of_column = spread * torch.randn(len(weight), 1, generator=torch.Generator().manual_seed(1))
    # The gold token rises with the sum of the others, so that it keeps its share.
    hidden = hidden + spread**2 / 2 * torch.nn.functional.normalize(weight[case["labels"]], dim=1)
    hidden = torch.cat([hidden, torch.ones(len(hidden), 1)], 1)
    return case | {"hidden": hidden.requires_grad_(), "weight": torch.cat([weight, of_column], 1).requires_grad_()}


def flat_case(rows: int) -> Case:
    """Random logits with a standard deviation of 1, of which no column could be left out."""
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(rows, 576, generator=g).requires_grad_(),
        "weight": (torch.randn(49152, 576, generator=g) / 24).requires_grad_(),
        "labels": torch.randint(49152, (rows,), generator=g),
        "source_ids": torch.randint(49152, (1, rows, ENTRIES), generator=g),
        "source_logprobs": torch.randn(1, rows, ENTRIES, generator=g).log_softmax(-1),
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.left_out", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["errors", "times"])
    parser.add_argument("--model", required=True, metavar="DIR", help="the directory of a causal language model")
    parser.add_argument(
        "--rows", type=int, metavar="N", help="tokens of text (default: 2048 for errors, 8192 for times)"
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="how often each is timed (default: 3)")
    parser.add_argument(
        "--case", default="", metavar="NAME", help="time the cases whose names contain this (default: all)"
    )
    parser.add_argument(
        "--share", type=float, default=SHARE, metavar="X", help=f"left out in what is timed (default: {SHARE})"
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the section left_out_WHAT of this page")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    here = surroundings()
    if args.what == "errors":
        text = errors(real_case(args.model, args.rows or 2048))
    else:
        rows = args.rows or 8192
        cases = {
            "real states": lambda: real_case(args.model, rows),
            "peaked, columns uneven": lambda: uneven(make_case("headline", "peaked")),
            "peaked, columns alike": lambda: make_case("headline", "peaked"),
            "flat": lambda: flat_case(rows // 4),
        }
        chosen = {name: make for name, make in cases.items() if args.case in name}
        text = times(chosen, args.rounds, args.share)
    command = f"python -m benchmarks.left_out {' '.join('DIR' if word == args.model else word for word in argv)}"
    text = f"Command: `{command}`; {here['cpu']}, 1 thread, float32, torch {here['torch']}; commit {here['commit']}.\n\n{text}"
    if args.write is None:
        print(text)
    else:
        write_section(args.write, f"left_out_{args.what}", text)


if __name__ == "__main__":
    main_of(main)
