"""The judges of the inference mode, each of which scores the responses of all sources: reward models, functions, graders, models on
servers, and scores that are there already.

Letters: E examples, C candidate responses per example.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import inspect
import io
import itertools
import json
import math
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from profuser.errors import DataError, in_own_function, in_short
from profuser.models.load import chat_template, check_ids, template_text
from profuser.models.merged_adapter import model_fingerprint
from profuser.models.padding import padded
from profuser.models.reward import load_reward_model, open_reward_model
from profuser.prepare import graders
from profuser.prepare.data import Row, for_functions
from profuser.prepare.given import LARGEST_SCORE, file_digest
from profuser.prepare.given_preferences import given_scores
from profuser.prepare.rubric import Judged, RubricJudge, rubric_text
from profuser.prepare.server import Server
from profuser.progress import silent
from profuser.recipe.places import load_function
from profuser.recipe.rubric import RubricConfig
from profuser.recipe.schema import JudgeConfig, SourceConfig
from profuser.recipe.server import ServerConfig
from profuser.store.files import sha256
from profuser.store.unfinished import Unfinished
from profuser.text.chat import RESPONSE
from profuser.text.conversation import Conversation, Turn
from profuser.text.template import ChatTemplate, conversation
from profuser.text.turns import TURN


def judge_fingerprint(config: JudgeConfig) -> str:
    """Returns a short hash that changes whenever the judge may give other scores.

    For a reward model it covers the model's files; for a function it covers the code of the whole module that defines it, since
    the function may call others there, but neither comments nor blank lines. For scores it covers their file, and for a model on a
    server its name and what it is asked.
    """
    if config.scores is not None:
        return file_digest(f"judges: {config.name}: scores", config.scores)
    if config.grader is not None:
        return sha256(f"{config.grader} {without_comments(inspect.getsource(graders))}".encode())[:16]
    if isinstance(config.server, ServerConfig):
        rubric = config.rubric or RubricConfig()
        asked = {**vars(rubric), "text": rubric_text(config.name, rubric), "model": config.server.model}
        return sha256(json.dumps(asked, sort_keys=True).encode())[:16]
    if config.model is not None:
        files = model_fingerprint(reward_source(config, config.model))
        if config.chat_template is None:
            return files
        template = template_text(f"judge {config.name}", config.chat_template)
        return hashlib.sha256(f"{files} {template}".encode()).hexdigest()[:16]
    assert config.function is not None
    code = config.function
    module = inspect.getmodule(load_function(config.function, f"judges: {config.name}: function"))
    if module is not None:
        with contextlib.suppress(OSError, TypeError):  # a built-in or compiled module has no source code
            code = without_comments(inspect.getsource(module))
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def without_comments(code: str) -> str:
    """Returns Python code without comments, blank lines and spaces at the end of lines, all of which change no score.

    It stays text. A syntax tree is printed otherwise by every version of Python, and a store may be gone on with under another one.
    """
    lines, blank = code.split("\n"), set()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE):
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
            if not lines[row - 1]:  # within a text there are no such tokens, so that its blank lines stay
                blank.add(row)
    return "\n".join(line for row, line in enumerate(lines, start=1) if row not in blank).rstrip()


def open_judge(config: JudgeConfig) -> None:
    """Opens what a recipe names as a judge, without loading a model, so that what is wrong with it is found at the start.

    Raises:
        ConfigError: the function cannot be imported.
        DataError: the reward model's files are missing or broken, it is of another kind, it has no usable chat template, or a
            token for which it has no row.
    """
    if config.function is not None:
        load_function(config.function, f"judges: {config.name}: function")
    if config.grader is not None:
        graders.grader(config.grader)
    if config.server is not None:
        rubric_text(config.name, config.rubric or RubricConfig())
    if config.model is not None:
        model = open_reward_model(config.name, config.model, config.trust_remote_code, config.base)
        template = reward_template(config, config.model)
        if (rows := getattr(model.get_text_config(), "vocab_size", None)) is not None:
            check_ids(f"judge {config.name}", used_ids(template), rows)


def used_ids(template: ChatTemplate) -> Iterator[int]:
    """Yields the ids of all tokens that a judge may read: those of text, and the control tokens that its template writes."""
    tokenizer: Any = template.tokenizer
    control = {*tokenizer.all_special_ids, *(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)}
    yield from (i for i in tokenizer.get_vocab().values() if i not in control)
    yield from template.ids(conversation("x", "y"))


def reward_source(config: JudgeConfig, location: str) -> SourceConfig:
    """Returns the reward model at `location` as what loads models and tokenizers takes."""
    return SourceConfig(
        name=f"judge {config.name}",
        model=location,
        base=config.base,
        chat_template=config.chat_template,
        trust_remote_code=config.trust_remote_code,
    )


def reward_template(config: JudgeConfig, location: str, *, date: datetime.date | None = None) -> ChatTemplate:
    """Returns the chat template in which the reward model at `location` reads a conversation."""
    template = chat_template(reward_source(config, location), date=date)
    # A judge that does not see the response scores all of them alike.
    answers = [conversation("x", response) for response in ("yes", "no")]
    if template.ids(answers[0]) == template.ids(answers[1]):
        raise DataError(
            f"a chat template must show the response, {template.name}'s renders two of them as "
            f"{in_short(template.text(answers[0]))}; {template.fix}"
        )
    return template


def check_conversations(config: JudgeConfig, rows: Sequence[Row]) -> None:
    """Checks that a reward model's template shows all turns of conversations, so that no response is judged without its context.

    Of the conversations with a system message, and of those without, the longest stands for all.

    Raises:
        DataError: it does not.
    """
    talks = [row["prompt"] for row in rows if isinstance(row["prompt"], Conversation)]
    if config.model is None or not talks:
        return
    template = reward_template(config, config.model)
    longest = {talk.turns[0].role: talk for talk in sorted(talks, key=lambda talk: len(talk.turns))}
    for talk in longest.values():
        turns = Conversation(tuple(Turn(turn.role, TURN.format(n)) for n, turn in enumerate(talk.turns)))
        try:
            (text,) = template.many_texts([conversation(template.seen(turns), RESPONSE)])
        except DataError as error:
            raise DataError(f"judge {config.name}: {error}") from None
        if unseen := [turn for turn in turns.turns if turn.text not in text]:
            raise DataError(
                f"judge {config.name}: a chat template must show every message, {template.name}'s leaves out the {unseen[0].role}'s where "
                f"there are {len(turns.turns)}; {template.fix}, or take the judge out"
            )


class Judge(Protocol):
    """A function that scores the C candidate responses to each of E prompts."""

    def __call__(
        self,
        examples: Sequence[Row],
        candidates: Sequence[Sequence[str]],
        progress: Callable[..., None] = silent,
        kept: Unfinished | None = None,
    ) -> np.ndarray:
        """Returns the scores, (E, C) float32.

        A score is NaN where the judge gave none. An empty candidate is not shown to the judge, and its score is NaN as well.

        Args:
            examples: E rows of the data. candidates: for each of them C responses.
            progress: called as `Progress.update` is.
            kept: where scores that are expensive are kept until all are there.
        """
        ...


def load_judge(config: JudgeConfig, device: torch.device | str = "cpu", *, date: datetime.date | None = None) -> Judge:
    """Loads the judge that a recipe names. `date` is what its chat template gets; None means today."""
    if config.function is not None:
        function = load_function(config.function, f"judges: {config.name}: function")
        return _function_judge(config.name, config.function, function)
    if config.grader is not None:
        return _function_judge(config.name, f"the grader {config.grader}", graders.grader(config.grader))
    if config.server is not None:
        return _server_judge(config)
    if config.scores is not None:
        return _given_judge(config.name, config.scores)
    assert config.model is not None
    return _reward_model_judge(config, config.model, device, date)


def _given_judge(name: str, path: str) -> Judge:
    """Makes a judge of the scores in a file."""
    given = given_scores(name, path)

    def score(
        examples: Sequence[Row],
        candidates: Sequence[Sequence[str]],
        progress: Callable[..., None] = silent,
        kept: Unfinished | None = None,
    ) -> np.ndarray:
        of_all = [
            [given.score(example, text) if text else math.nan for text in texts]
            for example, texts in zip(examples, candidates, strict=True)
        ]
        progress(len(examples))
        return np.array(of_all, dtype=np.float32).reshape(len(examples), len(candidates[0]))

    return score


def _server_judge(config: JudgeConfig) -> Judge:
    """Makes a judge of a model on a server. Equal responses to a prompt are judged once."""
    assert isinstance(config.server, ServerConfig)
    server = Server(config.server, f"judges: {config.name}: server")
    judge = RubricJudge(config.name, server, config.rubric or RubricConfig())

    def score(
        examples: Sequence[Row],
        candidates: Sequence[Sequence[str]],
        progress: Callable[..., None] = silent,
        kept: Unfinished | None = None,
    ) -> np.ndarray:
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        places: dict[tuple[int, str], list[int]] = {}
        for e, responses in enumerate(candidates):
            for c, text in enumerate(responses):
                if text:
                    places.setdefault((e, text), []).append(c)
        left = Counter(e for e, _ in places)
        progress(len(examples) - len(left))
        wanted = []

        def give(e: int, text: str, value: float) -> None:
            scores[e, places[e, text]] = value
            left[e] -= 1
            progress(int(left[e] == 0))

        for (e, text), where in places.items():
            known = kept.results.get((e, where[0])) if kept is not None else None
            if isinstance(known, list) and len(known) == 1 and isinstance(known[0], int | float | None):
                give(e, text, math.nan if known[0] is None else known[0])
            else:
                wanted.append(Judged((e, where[0]), examples[e]["prompt"], examples[e]["response"], text))
        for judged, value in judge.scores(wanted):
            if kept is not None:
                kept.add(judged.place, [None if math.isnan(value) else value])
            give(judged.place[0], judged.response, value)
        return scores

    return score


def _function_judge(judge: str, path: str, function: Callable) -> Judge:
    """Makes a judge of a function, whose results are checked. `path` is what messages call it."""

    def score(
        examples: Sequence[Row],
        candidates: Sequence[Sequence[str]],
        progress: Callable[..., None] = silent,
        kept: Unfinished | None = None,
    ) -> np.ndarray:
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        for e, (example, responses) in enumerate(zip(examples, candidates)):
            shown = [c for c, text in enumerate(responses) if text]
            given = _numbers(judge, path, function, example, [responses[c] for c in shown]) if shown else []
            scores[e, shown] = given
            progress(1)
        return scores

    return score


def _numbers(judge: str, path: str, function: Callable, example: Row, responses: Sequence[str]) -> list[float]:
    """Calls a judge's function, and checks that it gives one number per response."""
    example = for_functions(example)
    rule = f"judge {judge}: {path} must return one number per response, on the prompt {in_short(example['prompt'])} it"
    try:
        given = function(example, list(responses))
    except (Exception, SystemExit) as error:  # the function is the user's own, which may raise anything
        raise DataError(f"{rule} raised {in_own_function(error)}; fix the function") from error
    try:
        # The numbers of a text would be its digits, and those of a set or mapping are in no order.
        numbers = None if isinstance(given, (str, bytes, set, frozenset, dict)) else [float(x) for x in given]
    except Exception:  # a generator of the user's own may raise anything, too
        numbers = None
    if inspect.iscoroutine(given):
        given.close()  # else Python warns, at some later time, that nobody has waited for it
    if numbers is None:
        raise DataError(f"{rule} returned {in_short(given)}; fix the function")
    if len(numbers) != len(responses):
        raise DataError(f"{rule} returned {len(numbers)} numbers for {len(responses)} responses; fix the function")
    if large := next((x for x in numbers if LARGEST_SCORE < abs(x) < math.inf), None):
        raise DataError(
            f"{rule} returned {large:g}, and scores are kept in fp32; return numbers below {LARGEST_SCORE:.1e}"
        )
    return numbers


def try_function_judge(config: JudgeConfig, example: Row, candidates: int) -> None:
    """Calls a judge that is a function once, on so many responses, so that a wrong one is found before any model has run.

    Raises:
        DataError: the function fails, or returns something else than one number per response.
    """
    if config.function is not None or config.grader is not None:
        text = example["response"] or "An answer."
        load_judge(config)([example], [[text, *(f"{text} {n}" for n in range(1, candidates))]])


def _reward_model_judge(
    config: JudgeConfig, location: str, device: torch.device | str, date: datetime.date | None
) -> Judge:
    """Makes a judge of the reward model at `location`.

    It gives a response the score that transformers' AutoModelForSequenceClassification gives to the whole conversation in the
    model's own chat template, alone and without padding.
    """
    model, _ = load_reward_model(config.name, location, config.trust_remote_code, device, config.base)
    template = reward_template(config, location, date=date)
    limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    pad = _pad_id(model)

    @torch.no_grad()
    def score(
        examples: Sequence[Row],
        candidates: Sequence[Sequence[str]],
        progress: Callable[..., None] = silent,
        kept: Unfinished | None = None,
    ) -> np.ndarray:
        # Render and tokenise the conversations. Of one that is too long for the model, the beginning is left out. Equal ones
        # are scored once, so that equal responses get equal scores whatever they are padded to.
        scores = np.full((len(examples), len(candidates[0])), np.nan, dtype=np.float32)
        places: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        cells = [(e, c) for e, responses in enumerate(candidates) for c, text in enumerate(responses) if text]
        prompts = [template.seen(example["prompt"]) for example in examples]
        conversations = [conversation(prompts[e], candidates[e][c]) for e, c in cells]
        for cell, ids in zip(cells, template.many_ids(conversations)):
            places.setdefault(tuple(ids[-limit:]), []).append(cell)

        # Score them in batches of similar length.
        by_length = sorted(places, key=len)
        for first in range(0, len(by_length), config.batch_size):
            batch = by_length[first : first + config.batch_size]
            for ids, value in zip(batch, _rewards(model, batch, pad)):
                for place in places[ids]:
                    scores[place] = value
            progress(0, tokens=sum(map(len, batch)))
        progress(len(examples))
        return scores

    return score


def _pad_id(model: PreTrainedModel) -> int | None:
    """Returns the id that the model's configuration names as its padding, or None if it names none that the model has."""
    pad = model.config.get_text_config().pad_token_id
    embeddings = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", 1 << 62)
    return pad if pad is not None and 0 <= pad < size else None


def _rewards(model: PreTrainedModel, batch: Sequence[Sequence[int]], pad: int | None) -> list[float]:
    """Returns the score that a reward model gives to each conversation alone, from one forward pass over the padded batch.

    transformers reads the score at the last token that is not the padding's, or at the very last one where the model has no
    padding. More padding does not move the first of these places. For the second, the batch is padded with a token in which
    no conversation ends.
    """
    if pad is None:
        ends = {ids[-1] for ids in batch}
        pad = next(i for i in itertools.count() if i not in ends)
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = pad
    input_ids, mask = padded(batch, pad)
    logits = model(input_ids=input_ids.to(model.device), attention_mask=mask.to(model.device)).logits
    return logits[:, 0].float().tolist()
