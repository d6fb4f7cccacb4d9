"""Lets a model answer by transformers' continuous batching: as soon as a response has ended, the next prompt takes its place.

A static batch takes as long as its longest response. Here the keys and values of all responses lie in pages of one cache, and every step
computes a token of each response that goes on, and the prompts of those that begin. Which responses are computed together depends on
when others end, so that rounding, and what is sampled, depends on it as well.

An architecture can read its cache in a way of its own, and would then write something else without a word. One whose attention cannot be
replaced is therefore refused, and what another writes after two of the first prompts is held against an ordinary forward pass.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from profuser.errors import ConfigError, ProfuserError, first_line, is_lack_of_memory
from profuser.models.continuation import Sampling

PAGE = 256
"""How many tokens of a response a page of the cache holds, unless transformers is told otherwise. Its versions differ in how it is told."""
TRIED = 16
"""How many tokens are tried after a prompt, before the prompts are answered."""
LONGEST_TRIED = 2048
"""The longest prompt in tokens that is tried, if there is a shorter one."""
ROUNDING = {torch.float32: 0.002, torch.float16: 0.1}
"""By how many nats the log-probability of a tried token may differ from that of an ordinary pass, by the model's dtype. Two ways to sum up
differ by less, and a model that reads another token's keys, or its own at other positions, by more."""
COARSE = 0.5
"""The same for every other dtype, such as bf16."""

Written = tuple[int, list[int], list[float]]
"""The number of a prompt, the tokens that were written after it, and their log-probabilities where they were asked for."""


class ContinuousBatches:
    """Continuous batching of one model, which stays ready for further prompts. It is used as a context manager.

    Args:
        name: the model's name in errors. ends: the ids that end a response. at_once: how many responses are computed together on a CPU; a
            GPU takes as many as its free memory holds. longest: the longest sequence in tokens.
        sampling: None takes the most probable token.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        *,
        ends: Sequence[int],
        at_once: int,
        longest: int,
        sampling: Sampling | None,
    ):
        self.name, self.model, self.ends = name, model, list(ends)
        self.at_once, self.longest, self.sampling = at_once, longest, sampling
        self._manager: Any = None
        self._tried = False

    def __enter__(self) -> ContinuousBatches:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()

    def answers(
        self, prompts: Mapping[int, Sequence[int]], rooms: Mapping[int, int], seed: int = 0
    ) -> Iterator[tuple[int, list[int]]]:
        """Yields what the model writes after each prompt, up to and with the first end, in the order in which it is finished.

        Args:
            prompts: the tokens of every prompt by its number. rooms: how many tokens may follow each, at least 1.
            seed: what is sampled with. The engine's random numbers begin again with it, so that the same seed gives the first prompts the
                same numbers, whichever they are.
        Raises:
            ConfigError: continuous batching does not work with this model, or writes something else than the model.
            ProfuserError: a response failed.
        """
        if not self._tried:
            by_length = sorted(prompts, key=lambda number: len(prompts[number]))
            short = [number for number in by_length if len(prompts[number]) <= LONGEST_TRIED] or by_length[:1]
            tried = {short[0], short[-1]}
            self._try({n: prompts[n] for n in tried}, {n: min(TRIED, rooms[n]) for n in tried})
            self._tried = True
        if self._manager is None:
            self._start(self.sampling)
        torch.manual_seed(seed)
        for number, tokens, _ in self._written(prompts, rooms):
            yield number, tokens

    def _written(self, prompts: Mapping[int, Sequence[int]], rooms: Mapping[int, int]) -> Iterator[Written]:
        manager = self._manager
        for number, ids in prompts.items():
            manager.add_request(list(ids), request_id=str(number), max_new_tokens=rooms[number], eos_token_id=self.ends)
        left = len(prompts)
        while left:
            result = manager.get_result(timeout=1)
            if result is None:
                if not manager.is_running():
                    self._fail(manager.background_thread_status.fatal_error)
                continue
            if result.error is not None:
                self._fail(manager.background_thread_status.fatal_error or result.error)
            if result.is_finished():
                left -= 1
                yield int(result.request_id), list(result.generated_tokens), list(result.logprobs)

    def _fail(self, error: object) -> NoReturn:
        """Raises what has stopped the engine. A lack of memory keeps its own error."""
        if isinstance(error, Exception) and is_lack_of_memory(error):
            raise error
        reason = first_line(error) if isinstance(error, Exception) else str(error).strip().partition("\n")[0]
        raise ProfuserError(
            f"{self.name}: transformers' continuous batching has failed ({reason or 'it gave no reason'}); set generation.engine: "
            "transformers"
        )

    def _start(self, sampling: Sampling | None, *, logprobs: bool = False) -> None:
        if not self.model._can_set_attn_implementation():
            self._refuse("its attention cannot be replaced by one that reads the pages")
        # What a generation config of the model's own says of sampling and of repetitions would change the answers.
        generation = GenerationConfig(eos_token_id=self.ends, pad_token_id=self.ends[0], max_new_tokens=self.longest)
        if sampling is not None:
            generation.update(do_sample=True, temperature=sampling.temperature, top_p=sampling.top_p, top_k=0)
        batching = ContinuousBatchingConfig(seed=0, return_logprobs=logprobs)  # `answers` gives it another seed
        if hasattr(batching, "auto_switch_to_flash"):  # transformers 5.17 has no such choice
            batching.auto_switch_to_flash = _has_flash(self.model.dtype)
        if self.model.device.type == "cpu":  # where it would take nearly all of the machine's memory
            batching.max_requests_per_batch = self.at_once
            batching.num_blocks = self.at_once * math.ceil(self.longest / PAGE) + 1
            batching.max_batch_tokens = max(2 * self.at_once, PAGE)
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # its errors become one line of ours
        try:
            self._manager = self.model.init_continuous_batching(generation, batching)  # pyrefly: ignore[not-callable]
            self._manager.warmup()
        except (AttributeError, ValueError, RuntimeError, KeyError, ImportError, OSError) as error:
            self._manager = None
            if is_lack_of_memory(error):
                raise
            # A cache of less than no pages is how it says that none fits.
            if any(count in str(error) for count in ("num_sectors", "num_blocks")):
                raise torch.OutOfMemoryError("no page of continuous batching's cache fits beside the model") from error
            self._refuse(first_line(error), error)
        self._manager.start()

    def _refuse(self, reason: str, error: Exception | None = None) -> NoReturn:
        """Raises ConfigError for a model with which the engine does not begin."""
        raise ConfigError(
            f"{self.name}: generation.engine continuous must have a model that transformers' continuous batching knows, "
            f"{type(self.model).__name__} is none ({reason}); set generation.engine: transformers"
        ) from error

    def _stop(self) -> None:
        """Ends the engine's thread, whatever it is at, and gives back its cache."""
        if self._manager is not None:
            self._manager.stop(hard_stop=True)
            self._manager.destroy()
            self._manager = None

    @torch.no_grad()
    def _try(self, prompts: Mapping[int, Sequence[int]], rooms: Mapping[int, int]) -> None:
        """Raises ConfigError unless the log-probabilities of greedy tokens are those of an ordinary forward pass."""
        self._start(None, logprobs=True)
        try:
            written = list(self._written(prompts, rooms))
        except ProfuserError as error:
            raise ConfigError(str(error)) from error
        finally:
            self._stop()
        for number, tokens, logprobs in written:
            ids = torch.tensor([[*prompts[number], *tokens]], device=self.model.device)
            logits = self.model(input_ids=ids).logits[0, -len(tokens) - 1 : -1].float()
            own = logits.log_softmax(-1).gather(-1, ids[0, -len(tokens) :, None])[:, 0].cpu()
            error = float((own - torch.tensor(logprobs)).abs().max())
            if not error <= ROUNDING.get(self.model.dtype, COARSE):
                raise ConfigError(
                    f"{self.name}: generation.engine continuous must compute what the model itself computes, for "
                    f"{type(self.model).__name__} its log-probabilities are wrong by {error:.3g}; set generation.engine: transformers"
                )


def _has_flash(dtype: torch.dtype) -> bool:
    """Whether transformers may look for flash attention: an installed one would be taken, and it computes in the dtype.

    transformers would otherwise download a kernel from the Hub, also in place of flash attention 2 where the package kernels is there.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return False
    return is_flash_attn_3_available() or (
        is_flash_attn_2_available() and not is_flash_attn_3_available(kernels_fallback_ok=True)
    )
