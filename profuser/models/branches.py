"""A text that a model has read, and from any token of which the model can go on along many branches (tree attention).

Several texts can be read and continued together, as the rows of one batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, NoReturn

import torch
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from profuser.errors import DataError

Branch = tuple[int, tuple[int, ...]]
"""The number of the text's tokens before the branch, and the tokens that follow them instead of the text's own."""

MAX_TOKENS = 512  # so many tokens of branches are computed at a time

UNABLE = (RuntimeError, ValueError, TypeError, IndexError, AttributeError)
"""What a model raises that takes no such cache or mask."""


class Branches:
    """All branches share one sequence of the key-value cache with the text.

    By a mask, every token of a branch attends to the text before the branch and to its own ancestors only. So nothing is
    copied, and every distinct branch is computed once. The cache keeps all tokens in every layer: one that forgets what lies
    outside of a layer's window would count the tokens of other branches as well. The mask knows the windows instead.

    Args:
        model: any causal Hugging Face model whose attention takes a 4-D mask; `check` finds out.
        ids: the text's T tokens.
        otherwise: what the user can do where the model cannot, the end of the error's line.
    Attributes:
        hidden: (T, D), state t is the one behind the text's first t + 1 tokens.

    The text may be changed by `become`, which keeps the cache of what both have in common.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], otherwise: str):
        self._model, self._otherwise = model, otherwise
        self._ids: tuple[int, ...] = ()
        self._states: dict[Branch, torch.Tensor] = {}
        self._seen: dict[Branch, torch.Tensor] = {}  # where a branch's tokens stand in the cache
        with self._refusing():
            self._cache = DynamicCache()
            self.hidden = torch.empty(0, 0)
            self.become(ids)

    @property
    def ids(self) -> tuple[int, ...]:
        """The text's tokens."""
        return self._ids

    @torch.no_grad()
    def become(self, ids: Sequence[int]) -> None:
        """Reads another text instead, and forgets all branches. What it has in common with this one is not read again."""
        if (kept := self._turn_to(ids)) < len(ids):
            out = self._model.base_model(
                torch.tensor([self._ids[kept:]], device=self._model.device),
                past_key_values=self._cache,
                use_cache=True,
            )
            new = out.last_hidden_state[0]
            self.hidden = torch.cat([self.hidden, new]) if kept else new

    def states(self, branches: Sequence[Branch]) -> torch.Tensor:
        """The states behind some branches, (n, D). No branch begins before the text's first token."""
        with self._refusing():
            _compute([(self, self._missing(branches))])
        return self._known(branches)

    def forget(self) -> None:
        """Forgets all branches."""
        grown = self._cache.get_seq_length() - len(self._ids)
        if grown > 0:
            self._cache.crop(-grown)
        self._states.clear()
        self._seen.clear()

    def check(self) -> None:
        """Computes the text's last token as a branch of its own.

        Raises:
            DataError: the model cannot do that, or gives another state than for the text.
        """
        last: Branch = (len(self._ids) - 1, self._ids[-1:])
        with self._refusing():
            _compute([(self, [last])])
        fault = _difference(self._states[last], self.hidden[-1])
        self.forget()
        if fault:
            self._refuse(fault)

    @contextlib.contextmanager
    def _refusing(self) -> Generator[None]:
        """Turns what a model raises that takes no such cache or mask into one line."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except UNABLE as error:
            self._refuse(f"it fails with {type(error).__name__}")

    def _refuse(self, fault: str) -> NoReturn:
        attention = getattr(self._model.config, "_attn_implementation", None)
        raise DataError(
            "a model must be able to go on from one text along several branches (a 4-D attention mask), "
            f"{type(self._model).__name__} with attention {attention} is not: {fault}; {self._otherwise}"
        ) from None

    def _turn_to(self, ids: Sequence[int]) -> int:
        """Forgets all branches and the text from the first token on in which another one differs.

        Returns:
            How many tokens they have in common. The states of the others are missing until they are computed.
        """
        self.forget()
        kept = next((n for n, (a, b) in enumerate(zip(self._ids, ids)) if a != b), min(len(self._ids), len(ids)))
        if kept < len(self._ids):
            self._cache.crop(kept - len(self._ids))
            self.hidden = self.hidden[:kept]
        self._ids = tuple(ids)
        return kept

    def _missing(self, branches: Sequence[Branch]) -> list[Branch]:
        """The branches and their ancestors that are not computed yet. Every one stands behind its ancestors."""
        new: dict[Branch, None] = {}
        for cut, tokens in map(self._without_text, branches):
            for n in range(1, len(tokens) + 1):
                if (cut, tokens[:n]) not in self._states:
                    new[cut, tokens[:n]] = None
        return list(new)

    def _known(self, branches: Sequence[Branch]) -> torch.Tensor:
        """The states behind branches that have been computed, (n, D)."""
        own = map(self._without_text, branches)
        return torch.stack([self._states[of] if of[1] else self.hidden[of[0] - 1] for of in own])

    def _without_text(self, branch: Branch) -> Branch:
        """The same branch without the tokens in which it still follows the text."""
        cut, tokens = branch
        while tokens and cut < len(self._ids) and tokens[0] == self._ids[cut]:
            cut, tokens = cut + 1, tokens[1:]
        return cut, tokens


Wanted = tuple[Branches, Sequence[int], Sequence[Branch]]
"""A text, the tokens that it has to become, and the branches behind which its states are wanted."""


def states_together(wanted: Sequence[Wanted]) -> list[torch.Tensor]:
    """What `become` and then `states` give for each of several texts of one model, which are computed side by side.

    Every text is a row of one batch, with its own places in the cache and its own positions, so that the rows need not be of one
    length: by the mask, a row's tokens attend to their own text alone. `fault_together` finds out whether the model can do that.
    """
    if len(wanted) == 1:
        text, ids, branches = wanted[0]
        text.become(ids)
        return [text.states(branches)]
    with wanted[0][0]._refusing():
        return _states_together(wanted)


def _states_together(wanted: Sequence[Wanted]) -> list[torch.Tensor]:
    rows, grown = [], []
    for text, ids, branches in wanted:
        kept = text._turn_to(ids)
        # Until it is read, a token of the text is a branch behind the tokens before it.
        grown.append([(n, (ids[n],)) for n in range(kept, len(ids))])
        rows.append((text, [*grown[-1], *text._missing(branches)]))
    _compute(rows)
    for (text, _, _), new in zip(wanted, grown):
        if new:
            text.hidden = torch.cat([text.hidden, torch.stack([text._states.pop(of) for of in new])])
    return [text._known(branches) for text, _, branches in wanted]


def fault_together(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> str | None:
    """Why a model cannot read texts together, or None if it can.

    Every text is read alone. Then its last two tokens are read again, together with those of the others, and the states compared.
    """
    read = [Branches(model, ids, "leave it out") for ids in texts]
    expected = [text.hidden[-2:] for text in read]
    for text in read:
        text.become(text.ids[:-2])
    try:
        _states_together([(text, ids, [(len(ids), ())]) for text, ids in zip(read, texts, strict=True)])
    except torch.OutOfMemoryError:
        raise
    except UNABLE as error:
        return f"it fails with {type(error).__name__}"
    return next((fault for text, alone in zip(read, expected) if (fault := _difference(text.hidden[-2:], alone))), None)


def _difference(states: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What to say if states differ by more than the rounding of sums that are added in another order, else None."""
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    apart = (states.float() - expected.float()).abs().max()
    # Written so that what is no number differs as well.
    return None if apart <= tolerance * expected.float().abs().max() else f"its states differ by {float(apart):.2g}"


def _compute(rows: Sequence[tuple[Branches, Sequence[Branch]]]) -> None:
    """Computes branches of texts, each one token longer than its text, a known branch, or one before it in its row."""
    waiting = [(text, new) for text, new in rows if new]
    while waiting:
        most = max(MAX_TOKENS // len(waiting), 1)
        _forward([(text, new[:most]) for text, new in waiting])
        waiting = [(text, new[most:]) for text, new in waiting if len(new) > most]


@torch.no_grad()
def _forward(rows: Sequence[tuple[Branches, Sequence[Branch]]]) -> None:
    """One forward pass. A row that is shorter than the longest one is padded at its end."""
    model, dtype = rows[0][0]._model, rows[0][0].hidden.dtype
    config = model.config.get_text_config()
    sizes = [text._cache.get_seq_length() for text, _ in rows]
    counts = [len(new) for _, new in rows]
    whole = max(size + count for size, count in zip(sizes, counts))
    mask = torch.zeros(len(rows), 1, max(counts), whole, dtype=torch.bool)
    near = mask.clone()  # without what is outside of the window
    window = getattr(config, "sliding_window", None) or whole
    tokens_of, positions = torch.zeros(2, len(rows), max(counts), dtype=torch.long)
    for row, ((text, new), size, count) in enumerate(zip(rows, sizes, counts)):
        for n, (cut, tokens) in enumerate(new):
            before = text._seen[cut, tokens[:-1]] if tokens[1:] else torch.arange(cut)
            text._seen[cut, tokens] = seen = torch.cat([before, torch.tensor([size + n])])
            mask[row, 0, n, seen] = near[row, 0, n, seen[-window:]] = True
            tokens_of[row, n], positions[row, n] = tokens[-1], cut + len(tokens) - 1
        mask[row, 0, count:, 0] = near[row, 0, count:, 0] = True  # padding has to see something, to stay finite
    caches = [text._cache for text, _ in rows]
    out = model.base_model(
        tokens_of.to(model.device),
        attention_mask=_by_layer(config, *(_added(m, dtype).to(model.device) for m in (mask, near))),
        position_ids=positions.to(model.device),
        past_key_values=caches[0] if len(caches) == 1 else _side_by_side(caches, counts),
        use_cache=True,
    )
    for (text, new), states in zip(rows, out.last_hidden_state):
        text._states.update(zip(new, states))


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The mask as every implementation of attention takes it: numbers that are added to the scores."""
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def _by_layer(
    config: PreTrainedConfig, mask: torch.Tensor, near: torch.Tensor
) -> torch.Tensor | dict[str, torch.Tensor]:
    """The mask that a model's layers need: that of their window, the one without, or one for either kind of layer."""
    if getattr(config, "sliding_window", None) is None:
        return mask
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
    if len(kinds) > 1:
        return {"full_attention": mask, "sliding_attention": near}
    return near if "sliding_attention" in kinds else mask


def _side_by_side(caches: Sequence[DynamicCache], counts: Sequence[int]) -> Cache:
    """Several texts' caches as that of a batch, for one forward pass in which row n has counts[n] tokens."""
    return Cache(layers=[_Rows(layers, counts) for layers in zip(*(cache.layers for cache in caches), strict=True)])


class _Rows(DynamicLayer):
    """One layer of several texts' caches. It keeps nothing itself: what a row reads goes to the end of the row's own cache."""

    def __init__(self, layers: Sequence[Any], counts: Sequence[int]):
        super().__init__()
        self._layers, self._counts = layers, counts

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        own = [
            layer.update(key_states[n : n + 1, :, :count], value_states[n : n + 1, :, :count])
            for n, (layer, count) in enumerate(zip(self._layers, self._counts))
        ]
        return _stacked([keys[0] for keys, _ in own]), _stacked([values[0] for _, values in own])

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self._layers)


def _stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """(B, H, T, D) of B tensors (H, T_b, D), with zeros behind the shorter ones."""
    heads, _, width = rows[0].shape
    whole = rows[0].new_zeros(len(rows), heads, max(row.shape[1] for row in rows), width)
    for n, row in enumerate(rows):
        whole[n, :, : row.shape[1]] = row
    return whole
