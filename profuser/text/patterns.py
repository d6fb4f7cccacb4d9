"""Tries the regular expressions of a tokenizer on texts that are hard for them, in a helper process with a limit of time.

A tokenizer.json may hold a pattern such as `(a+)+b`, whose time doubles with every character of some texts. The library
`tokenizers` gives up on one place of a text after half a second, and ends the process with what is no ordinary exception, or it
needs as long for every place.
"""

from __future__ import annotations

import functools
import itertools
import json
import multiprocessing
import os
import resource
import signal
from typing import TYPE_CHECKING

from profuser.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tokenizers import Tokenizer

SECONDS = 5
"""The most CPU time that all the texts together may take. They take some milliseconds. A busy machine does not make it shorter."""
PATIENCE = 60
"""So many seconds are waited for the helper. If it has not come to an end by then, it has had no CPU time, and nothing is known."""
LENGTH = 40
"""How often a character, or two of them, stand in a row. A pattern that takes exponential time does not come to an end with so many."""
CHARACTERS = "a1 \n.é字"
"""Characters of the kinds that patterns tell apart."""


def check_patterns(name: str, backend: Tokenizer) -> None:
    """Raises DataError where a regular expression of a tokenizer takes exponential time. `name` is the model's, for the message."""
    parts = {part: getattr(backend, part) for part in ("normalizer", "pre_tokenizer")}
    rules = {part: json.loads(value.__getstate__()) for part, value in parts.items() if value is not None}
    patterns = tuple(_patterns(rules))
    if patterns and not _come_to_an_end(json.dumps(rules, sort_keys=True), patterns):
        shown = " or ".join(pattern[:60] for pattern in patterns)[:200]
        raise DataError(
            f"{name}: the regular expressions of a tokenizer must come to an end on every text, its tokenizer.json has one that takes "
            f"exponential time ({shown!r}); copy or download the tokenizer again, or use another model"
        )


def _patterns(rules: object) -> Iterator[str]:
    """Yields the regular expressions in some parts of a tokenizer.json."""
    if isinstance(rules, dict):
        for key, value in rules.items():
            if key == "Regex" and isinstance(value, str):
                yield value
            else:
                yield from _patterns(value)
    elif isinstance(rules, list):
        for value in rules:
            yield from _patterns(value)


def hard_texts(patterns: tuple[str, ...]) -> list[str]:
    """Returns texts on which a pattern that may take exponential time does: one character or two, many times, and what ends the match.

    What a pattern is looking for behind them stands in the pattern itself.
    """
    literal = "".join(patterns)
    letters = [c for c in literal[:1000] if c.isalnum()]
    repeated = dict.fromkeys([*CHARACTERS, *letters, *map("".join, itertools.pairwise(letters))])
    return [f"{c * LENGTH}{end}" for c in repeated for end in ("", f"!{literal[:1000]}", f"\x00{c}")]


@functools.cache
def _come_to_an_end(rules: str, patterns: tuple[str, ...]) -> bool:
    """Whether the parts of a tokenizer.json come to an end on hard texts. `rules` are the parts as JSON."""
    # A fork need not import anything again. It has no use for its parent's files, which it never closes properly.
    helper = multiprocessing.get_context("fork").Process(target=_try, args=(rules, patterns), daemon=True)
    helper.start()
    helper.join(PATIENCE)
    if helper.is_alive():
        helper.kill()
        helper.join()
        return True
    return helper.exitcode == 0


def _try(rules: str, patterns: tuple[str, ...]) -> None:
    """Tokenises hard texts. This is what the helper does; if it fails, it ends without a word and not with 0."""
    from tokenizers import Tokenizer

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it as well, and its parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Rust says there what it gave up on
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))  # ends this process
    code = 1
    try:
        model = {"type": "WordLevel", "vocab": {"": 0}, "unk_token": ""}
        bare = Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, **json.loads(rules)}))
        for text in hard_texts(patterns):
            bare.encode(text, add_special_tokens=False)
        code = 0
    except Exception:  # whatever else is wrong is said where the tokenizer is used
        code = 0
    finally:
        os._exit(code)
