"""Asks an OpenAI-compatible server, many requests at a time, and again where it fails for a while.

Only what nearly all of these servers know is used: `/models` and `/chat/completions`, without streaming.
"""

from __future__ import annotations

import os
import queue
import random
import threading
from collections.abc import Callable, Generator, Iterable
from typing import Any, NamedTuple, TypeVar

import requests

from profuser.errors import ConfigError, ProfuserError, first_line, in_short
from profuser.recipe.server import ServerConfig
from profuser.recipe.utf8 import SURROGATE

T = TypeVar("T")
R = TypeVar("R")

FIRST_WAIT = 1.0
"""The seconds between the first two tries. They double from one to the next."""
LONGEST_WAIT = 60.0
"""The most seconds between two tries, unless the server asks for more."""
LONGEST_ASKED = 600.0
"""The most seconds that a server may ask to wait."""
BUSY = (408, 409, 425, 429)
"""What a server answers that is too busy for the moment. It fails with 500 and above."""


class Reply(NamedTuple):
    """What a server replied to messages: the text, whether the model ended its turn, its reasoning if the server gives that apart, and
    how many tokens it wrote."""

    text: str
    finished: bool
    reasoning: str
    tokens: int


class Server:
    """A server that a recipe names.

    Args:
        place: the server's key in the recipe, for messages.
    Raises:
        ConfigError: the environment lacks the variable that holds the key.
    """

    def __init__(self, config: ServerConfig, place: str):
        self.config, self.place = config, place
        self._key = _key_of(config, place)
        self._stopped = threading.Event()
        self._own = threading.local()  # a session is for one thread
        self._model = config.model

    def check(self) -> None:
        """Finds out whether the server is there, takes the key and has the model, so that this is known before any model runs.

        Raises:
            ConfigError: it refuses the key, or has not the model.
            ProfuserError: it cannot be reached, or does not reply as these servers do.
        """
        try:
            found = self._send("GET", "models", None)
        except _Refused as refused:
            if refused.status in (401, 403) or self._model is None:
                raise
            return  # some servers do not list their models
        listed = found.get("data") if isinstance(found, dict) else None
        names = [entry.get("id") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        if self._model is None:
            if len(names) != 1 or not isinstance(names[0], str):
                raise ConfigError(
                    f"{self.place}.model must name the model where {self.config.url} has not exactly one, it lists "
                    f"{', '.join(map(str, names)) or 'none'}; name one"
                )
            self._model = names[0]
        elif names and self._model not in names:
            raise ConfigError(
                f"{self.place}.model must be one of those of {self.config.url}, {in_short(names)}, got {self._model}; name one"
            )

    def chat(self, messages: list[dict[str, Any]], **options: Any) -> Reply:
        """Lets the model reply to messages. `options` are further fields of the request, such as `temperature`.

        Raises:
            ConfigError: the server refuses the request.
            ProfuserError: it failed, was too busy or could not be reached, however often it was asked.
        """
        if self._model is None:
            self.check()
        found = self._send("POST", "chat/completions", {"model": self._model, "messages": messages, **options})
        try:
            choice = found["choices"][0]
            message = choice["message"]
            text, reason = message.get("content"), choice.get("finish_reason")
            if not isinstance(text, str | None):
                raise TypeError
        except (KeyError, IndexError, TypeError, AttributeError):
            raise self._error(f"must reply with choices, a message and its content, got {in_short(found)}") from None
        usage = found.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else 0
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        return Reply(
            _unicode(text or ""),
            reason == "stop",
            _unicode(reasoning) if isinstance(reasoning, str) else "",
            tokens if isinstance(tokens, int) else 0,
        )

    def all(self, jobs: Iterable[T], ask: Callable[[T], R]) -> Generator[tuple[T, R]]:
        """Calls `ask` for every job, many at a time, and yields each with its result as soon as it is there.

        It raises what one of them raises. Nothing is asked any more when this generator is closed.
        """
        waiting: queue.SimpleQueue[T] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[T, R | None, BaseException | None]] = queue.SimpleQueue()
        count = 0
        for job in jobs:
            waiting.put(job)
            count += 1
        stopped = self._stopped = threading.Event()

        def work() -> None:
            while not stopped.is_set():
                try:
                    job = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    done.put((job, ask(job), None))
                except BaseException as error:  # it is raised again by who waits for the results
                    done.put((job, None, error))
                    return

        # They are daemons, because a request that waits for its reply must not keep a stopped command from ending.
        for _ in range(min(self.config.concurrency, count)):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in range(count):
                job, result, error = done.get()
                if error is not None:
                    raise error
                yield job, result  # pyrefly: ignore[invalid-yield]  # without an error there is a result
        finally:
            stopped.set()

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """Sends a request, again and again if need be, and returns the JSON of the reply."""
        url = f"{self.config.url.rstrip('/')}/{path}"
        trouble, asked, stopped = "", 0.0, self._stopped
        for attempt in range(self.config.retries + 1):
            # Wait for 1, 2, 4 seconds and so on, more or less, so that many requests do not come again at the same moment.
            pause = min(FIRST_WAIT * 2.0 ** (attempt - 1), LONGEST_WAIT) * random.uniform(0.75, 1.25)
            if attempt and stopped.wait(max(pause, min(asked, LONGEST_ASKED))):
                break
            try:
                reply = self._session().request(
                    method, url, json=body, timeout=self.config.timeout, allow_redirects=False
                )
            except requests.RequestException as error:
                trouble, asked = _reason(error), 0.0
                continue
            if 300 <= reply.status_code < 400:
                raise self._error(
                    f"must not redirect requests, it names {reply.headers.get('Location')}", "name that url"
                )
            if reply.status_code in BUSY or reply.status_code >= 500:
                trouble, asked = self._said(reply), _seconds(reply.headers.get("Retry-After"))
                if "insufficient_quota" not in reply.text:
                    continue
            if reply.status_code >= 400:
                raise _Refused(
                    f"{self.place}: the server {self.config.url} refuses a request: {self._said(reply)}; {_fix(reply.status_code)}",
                    reply.status_code,
                )
            try:
                return reply.json()
            except (ValueError, RecursionError):
                raise self._error(f"must reply with JSON, got {in_short(reply.text)}", "correct its url") from None
        tries = self.config.retries + 1
        raise self._error(
            f"must reply, it did not in {tries} {'tries' if tries > 1 else 'try'} ({trouble or 'stopped'})",
            "start it or correct its url; what was answered is kept, and the same command goes on",
        )

    def _session(self) -> requests.Session:
        """This thread's session. It sends the recipe's key or none, and never one of a .netrc file."""
        if not hasattr(self._own, "session"):
            self._own.session = requests.Session()
            self._own.session.auth = self._signed
        return self._own.session

    def _signed(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _said(self, reply: requests.Response) -> str:
        """What a server said of an error, with its status, and without the key."""
        try:
            error = reply.json()
            error = error.get("error", error) if isinstance(error, dict) else error
            text = error.get("message", error) if isinstance(error, dict) else error
        except (ValueError, RecursionError):
            text = reply.text
        text = " ".join(str(text).split())[:300] or reply.reason
        return f"{reply.status_code} {text.replace(self._key, '***') if self._key else text}"

    def _error(self, rule: str, fix: str = "check that it is an OpenAI-compatible server") -> ProfuserError:
        return ProfuserError(f"{self.place}: the server {self.config.url} {rule}; {fix}")


class _Refused(ConfigError):
    """A server refuses a request, and would refuse it again."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def _key_of(config: ServerConfig, place: str) -> str:
    if config.key_variable is None:
        return ""
    key = os.environ.get(config.key_variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"{place}.key_variable must name an environment variable that holds the key, {config.key_variable} "
            f"{'holds none' if key else 'is not set'}; export it"
        )
    return key


def _reason(error: requests.RequestException) -> str:
    """Why a request had no reply. The objects within urllib3's message would say nothing to a user."""
    if isinstance(error, requests.Timeout):
        return "no reply in time"
    cause: BaseException = error
    while (inner := getattr(cause, "reason", None) or (cause.args[0] if cause.args else None)) is not None:
        if not isinstance(inner, BaseException):
            break
        cause = inner
    return first_line(cause).rpartition(">: ")[2].rpartition("): ")[2] or type(error).__name__


def _unicode(text: str) -> str:
    """A text as JSON spells it, with the character of broken bytes in place of halves of others, such as at the end of a cut reply."""
    return SURROGATE.sub("\ufffd", text)


def _seconds(header: str | None) -> float:
    """The seconds of a Retry-After. A date in its place counts as none."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0


def _fix(status: int) -> str:
    return {
        401: "give its key in the variable that key_variable names",
        403: "give its key in the variable that key_variable names",
        404: "correct its url or model",
        429: "wait, or raise the quota",
    }.get(status, "change what it complains about")
