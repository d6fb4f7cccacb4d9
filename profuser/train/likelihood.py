"""Measures how probable the target finds the ground truths of a split, for the validation and for the final scores.

It is teacher-forced: every token is predicted from the true tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from profuser.fusion_model import FusionModel
from profuser.progress import Progress
from profuser.recipe.schedule import Mode
from profuser.train.collate import collate
from profuser.train.sharding import is_main
from profuser.train.targets import Targets


@dataclass(frozen=True, slots=True)
class Likelihood:
    """The statistics of one split.

    nll: the nats of each ground truth, by example. response_bytes: its length in bytes, by example.
    ce: the mean nats per target token. kd: the divergence from the Min-CE winner, or from the mixed sources, in nats, as a
    mean over the positions of which they have a distribution.
    """

    nll: dict[int, float]
    response_bytes: dict[int, int]
    ce: float
    kd: float


@torch.no_grad()
def likelihood(
    model: FusionModel, targets: Targets, pad_id: int, batch_size: int, label: str, mixing: float | None = None
) -> Likelihood:
    """Computes the statistics of the wrapped model on a split's ground truths, in batches of similar length.

    Args:
        label: what the progress bar says. pad_id: the id of the padding. batch_size: how many sequences are computed at a time.
        mixing: as in `collate`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    weights = dict.fromkeys(Mode, 1.0)  # with a KD weight above 0 the batch holds the sources' distributions
    truths = np.flatnonzero(targets.modes == Mode.TRAINING)
    by_length = truths[np.argsort(targets.lengths[truths], kind="stable")].tolist()
    nll: dict[int, float] = {}
    response_bytes: dict[int, int] = {}
    kd_sum = ce_sum = 0.0
    kd_rows = tokens = 0
    with Progress(label, len(by_length), "examples", show=is_main(), brief=True) as bar:
        for first in range(0, len(by_length), batch_size):
            # CE and KD of every token of one batch.
            sequences = [targets.sequence(n) for n in by_length[first : first + batch_size]]
            batch = collate(
                [[sequence] for sequence in sequences], weights, weights, pad_id, targets.top_k, mixing=mixing
            )
            tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
            out = model(**tensors, reduction="sum", return_stats=True)

            # KD is added up over the positions that have a distribution, CE by sequence.
            covered = out["source_mass"] > 0
            kd_sum += float(out["kd"][covered].double().sum())
            kd_rows += int(covered.sum())
            for sequence, nats in zip(sequences, out["ce"].view(len(sequences), -1).double().sum(1).tolist()):
                nll[sequence.example], response_bytes[sequence.example] = nats, sequence.response_bytes
                ce_sum += nats
                tokens += sequence.labels
            bar.update(len(sequences), tokens=sum(len(sequence.input_ids) for sequence in sequences))
    model.train(was_training)
    return Likelihood(nll, response_bytes, ce_sum / max(tokens, 1), kd_sum / max(kd_rows, 1))
