"""`python -m profuser.experiments.topk_alone`: what `align` loses when a source gives its top k alone, as a server does.

The held-out conversations of the demo are aligned with the ranges that `source_topk` gives and without them. The tails are
compared where both give a distribution.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from profuser.alignment.align import AlignedText, align, prefix_ranges
from profuser.alignment.types import ALIGNED
from profuser.cli import main_of
from profuser.kernels.source_topk import source_topk
from profuser.models.head import head_of
from profuser.models.load import load_model, load_tokenizer
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.text.template import conversation

TOP_K = 10


@torch.no_grad()
def measure(target_name: str, source_name: str, rows: list[dict[str, str]]) -> dict[str, tuple[float, float]]:
    """(with ranges, with the top k alone) of the share of covered positions, and of the mean tail where both cover one."""
    configs = [SourceConfig(name=name, model=f"demo:{name}") for name in (target_name, source_name)]
    target, source = map(load_tokenizer, configs)
    model = load_model(configs[1], dtype=torch.float32)
    head = head_of(model).weight
    found: list[tuple[AlignedText, AlignedText]] = []
    for row in rows:
        chat = conversation(row["prompt"], row["response"])
        asked = prefix_ranges(chat, target, source)
        hidden = model.base_model(asked.input_ids[None]).last_hidden_state[0, asked.positions - 1]
        labels = asked.input_ids[asked.positions]
        ids, logprobs, _, ce, *of_ranges = source_topk(hidden, head, labels, TOP_K, ranges=asked)
        whole, alone = (align(chat, target, source, ids, logprobs, -ce, r, top_k=TOP_K) for r in (of_ranges, None))
        found.append((whole, alone))
    covered = [torch.cat([pair[n].skip_reason for pair in found]) == ALIGNED for n in (0, 1)]
    tails = [torch.cat([pair[n].source_tail for pair in found]) for n in (0, 1)]
    both = covered[0] & covered[1]
    return {
        "coverage": (covered[0].double().mean().item(), covered[1].double().mean().item()),
        "mean tail": (tails[0][both].mean().item(), tails[1][both].mean().item()),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="guardian", help="a bundled model (default: %(default)s)")
    parser.add_argument("--source", default="scholar", help="a bundled model (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="how many of the held-out conversations (default: all)")
    args = parser.parse_args(argv)
    lines = Path(resolve("demo:heldout.jsonl")).read_text(encoding="utf-8").splitlines()[: args.rows]
    found = measure(args.target, args.source, [json.loads(line) for line in lines])
    for name, (whole, alone) in found.items():
        print(f"{name}: {whole:.2%} with ranges, {alone:.2%} with the top k alone ({len(lines)} conversations)")


if __name__ == "__main__":
    main_of(main)
