"""Teacher-forced statistics of the target on the ground truths of one split, for validation and for the final scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from profuser.fusion_model import FusionModel
from profuser.progress import Progress
from profuser.recipe.schedule import Mode
from profuser.train.collate import collate
from profuser.train.targets import Targets


@dataclass(frozen=True, slots=True)
class Likelihood:
    """nll: nats of each ground truth, by example; response_bytes: its bytes. ce: mean nats per target token. kd: KL to the
    Min-CE winner in nats, mean over the positions that have a distribution."""

    nll: dict[int, float]
    response_bytes: dict[int, int]
    ce: float
    kd: float


@torch.no_grad()
def likelihood(model: FusionModel, targets: Targets, pad_id: int, batch_size: int, label: str) -> Likelihood:
    """Statistics of the wrapped model on a split's ground truths; label: for the progress."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    weights = dict.fromkeys(Mode, 1.0)
    truths = np.flatnonzero(targets.modes == Mode.TRAINING)
    by_length = truths[np.argsort(targets.lengths[truths], kind="stable")].tolist()
    nll: dict[int, float] = {}
    response_bytes: dict[int, int] = {}
    kd_sum = ce_sum = 0.0
    kd_rows = tokens = 0
    with Progress(label, len(by_length), "examples", brief=True) as bar:
        for first in range(0, len(by_length), batch_size):
            sequences = [targets.sequence(n) for n in by_length[first : first + batch_size]]
            batch = collate(sequences, weights, weights, pad_id, targets.top_k)
            tensors = {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
            out = model(**tensors, reduction="sum", return_stats=True)
            covered = out["source_mass"] > 0
            kd_sum += float(out["kd"][covered].double().sum())
            kd_rows += int(covered.sum())
            for s, nats in zip(sequences, out["ce"].view(len(sequences), -1).double().sum(1).tolist()):
                nll[s.example], response_bytes[s.example] = nats, s.response_bytes
                ce_sum += nats
                tokens += s.labels
            bar.update(len(sequences), tokens=sum(len(s.input_ids) for s in sequences))
    model.train(was_training)
    return Likelihood(nll, response_bytes, ce_sum / max(tokens, 1), kd_sum / max(kd_rows, 1))
