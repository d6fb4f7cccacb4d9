"""A text that a model has read, and from any token of which the model can go on along many branches (tree attention)."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import NoReturn

import torch
from transformers import DynamicCache, PreTrainedModel

from profuser.errors import DataError

Branch = tuple[int, tuple[int, ...]]
"""The number of the text's tokens before the branch, and the tokens that follow them instead of the text's own."""

MAX_TOKENS = 512  # so many tokens of branches are computed at a time


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
        self.forget()
        kept = next((n for n, (a, b) in enumerate(zip(self._ids, ids)) if a != b), min(len(self._ids), len(ids)))
        if kept < len(self._ids):
            self._cache.crop(kept - len(self._ids))
            self.hidden = self.hidden[:kept]
        self._ids = tuple(ids)
        if kept < len(ids):
            out = self._model.base_model(
                torch.tensor([self._ids[kept:]], device=self._model.device),
                past_key_values=self._cache,
                use_cache=True,
            )
            new = out.last_hidden_state[0]
            self.hidden = torch.cat([self.hidden, new]) if kept else new

    def states(self, branches: Sequence[Branch]) -> torch.Tensor:
        """The states behind some branches, (n, D). No branch begins before the text's first token."""
        own = [self._without_text(branch) for branch in branches]
        new: dict[Branch, None] = {}
        for cut, tokens in own:
            for n in range(1, len(tokens) + 1):
                if (cut, tokens[:n]) not in self._states:
                    new[cut, tokens[:n]] = None
        waiting = list(new)  # every branch stands behind its ancestors
        with self._refusing():
            for first in range(0, len(waiting), MAX_TOKENS):
                self._compute(waiting[first : first + MAX_TOKENS])
        return torch.stack([self._states[of] if of[1] else self.hidden[of[0] - 1] for of in own])

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
            self._compute([last])
        state, expected = self._states[last].float(), self.hidden[-1].float()
        self.forget()
        tolerance = 1e-3 if self.hidden.dtype == torch.float32 else 0.1
        if (apart := (state - expected).abs().max()) > tolerance * expected.abs().max():
            self._refuse(f"its states differ by {float(apart):.2g}")

    @contextlib.contextmanager
    def _refusing(self) -> Generator[None]:
        """Turns what a model raises that takes no such cache or mask into one line."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            self._refuse(f"it fails with {type(error).__name__}")

    def _refuse(self, fault: str) -> NoReturn:
        attention = getattr(self._model.config, "_attn_implementation", None)
        raise DataError(
            "a model must be able to go on from one text along several branches (a 4-D attention mask), "
            f"{type(self._model).__name__} with attention {attention} is not: {fault}; {self._otherwise}"
        ) from None

    def _without_text(self, branch: Branch) -> Branch:
        """The same branch without the tokens in which it still follows the text."""
        cut, tokens = branch
        while tokens and cut < len(self._ids) and tokens[0] == self._ids[cut]:
            cut, tokens = cut + 1, tokens[1:]
        return cut, tokens

    @torch.no_grad()
    def _compute(self, new: Sequence[Branch]) -> None:
        """Computes branches, each of which is one token longer than the text, a known branch, or one before it in `new`."""
        device, size = self._model.device, self._cache.get_seq_length()
        mask = torch.zeros(1, 1, len(new), size + len(new), dtype=torch.bool)
        near = mask.clone()  # without what is outside of the window
        window = getattr(self._model.config.get_text_config(), "sliding_window", None) or size + len(new)
        for n, (cut, tokens) in enumerate(new):
            before = self._seen[cut, tokens[:-1]] if tokens[1:] else torch.arange(cut)
            self._seen[cut, tokens] = torch.cat([before, torch.tensor([size + n])])
            mask[0, 0, n, self._seen[cut, tokens]] = True
            near[0, 0, n, self._seen[cut, tokens][-window:]] = True
        out = self._model.base_model(
            torch.tensor([[tokens[-1] for _, tokens in new]], device=device),
            attention_mask=self._by_layer(self._added(mask), self._added(near)),
            position_ids=torch.tensor([[cut + len(tokens) - 1 for cut, tokens in new]], device=device),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._states.update(zip(new, out.last_hidden_state[0]))

    def _added(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask as every implementation of attention takes it: numbers that are added to the scores."""
        dtype = self.hidden.dtype
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min).to(self._model.device)

    def _by_layer(self, mask: torch.Tensor, near: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask that the model's layers need: that of their window, the one without, or one for either kind of layer."""
        config = self._model.config.get_text_config()
        if getattr(config, "sliding_window", None) is None:
            return mask
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        if len(kinds) > 1:
            return {"full_attention": mask, "sliding_attention": near}
        return near if "sliding_attention" in kinds else mask
