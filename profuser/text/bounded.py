"""Renders a chat template in a helper process, within limits of time, memory and length.

A template is a program that comes with a model. Jinja's sandbox keeps it from files and from Python, but not from endless loops,
nor from `9 ** 9 ** 9`, which no exception can interrupt. The helper is a fork of this process, made when a template is first
rendered, and it ends by itself when nothing has been rendered for a while: a fork keeps the memory that its parent frees. A fork of a
large process takes tens of milliseconds, and models are often opened again: those with the same template share a helper.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import multiprocessing
import os
import resource
import signal
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import TemplateError

from profuser.errors import DataError

SECONDS = 20
"""The longest time that a template may take for the conversations that are rendered together."""
MEMORY_BYTES = 1 << 30
"""The memory that the helper may take beside what this process has taken when it is made."""
LENGTH, LENGTH_FACTOR = 1 << 20, 16
"""The most characters that a template may give: so many, and so many times what the conversation has."""
IDLE_SECONDS = 2
"""After how long without anything to render the helper ends."""
SHARED = 16
"""How many templates have a helper that others may share."""

FIX = "give another template, or another model"

Conversation = list[dict[str, Any]]
Render = Callable[..., list[str]]
"""A function of conversations, and of options by their names, that returns a text for each conversation."""

Reply = tuple[str | None, str, bool]
"""(None, the texts as JSON, False), or what was raised: its type, its message, and whether it is a TemplateError."""


class BoundedRenderer:
    """Renders conversations in a helper process, which is made when there is none."""

    made: ClassVar[weakref.WeakSet[BoundedRenderer]] = weakref.WeakSet()

    def __init__(self) -> None:
        self._helper: tuple[Any, Connection] | None = None
        self._process, self._lock = os.getpid(), threading.Lock()
        self.made.add(self)

    def __call__(self, render: Render, name: str, conversations: list[Conversation], **options: Any) -> list[str]:
        """Returns what `render` returns for conversations and options, a text for each conversation.

        Args:
            render: must be the same function in every call, though not the same object: the helper keeps the one that it was made with.
            name: whose template it is, for messages.
        Raises:
            DataError: a limit is exceeded.
            Exception: what `render` raised, by its name and message. A TemplateError stays one.
        """
        if self._process != os.getpid():  # a fork of the process must not talk to the helper of that one
            self._helper, self._process, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            reply = self._ask(render, name, conversations, options)
            if reply is None:  # the helper had ended, for there was nothing to render
                self._stop()
                reply = self._ask(render, name, conversations, options)
            if reply is None:
                self._stop()
                raise DataError(
                    f"{name}'s chat template must render within {SECONDS} s and {MEMORY_BYTES >> 20} MiB, its process was ended; {FIX}"
                )
        kind, content, is_refusal = reply
        if kind is None:
            return json.loads(content)
        if kind == "MemoryError":
            raise DataError(f"{name}'s chat template must render within {MEMORY_BYTES >> 20} MiB, it needs more; {FIX}")
        if kind == "length":
            raise DataError(f"{name}'s chat template must give at most {content} characters, it gives more; {FIX}")
        raise type(kind, (TemplateError if is_refusal else Exception,), {})(content)

    def _ask(
        self, render: Render, name: str, conversations: list[Conversation], options: dict[str, Any]
    ) -> Reply | None:
        """Sends conversations to the helper and returns its reply; None where it has ended."""
        if self._helper is None:
            self._helper = self._start(render)
        connection = self._helper[1]
        try:
            connection.send((conversations, options))
            if connection.poll(SECONDS):
                kind, is_refusal = json.loads(connection.recv_bytes())
                return kind, connection.recv_bytes().decode(errors="surrogatepass"), is_refusal
        except (EOFError, OSError):
            return None
        except BaseException:  # such as Ctrl-C: the reply that is still to come must not be taken for the next one
            self._stop()
            raise
        self._stop()
        raise DataError(f"{name}'s chat template must render within {SECONDS} s, it takes longer; {FIX}")

    def _start(self, render: Render) -> tuple[Any, Connection]:
        """Makes the helper, and returns it with this process's end of the connection."""
        for other in [*self.made]:
            other._forget_ended()
        ours, theirs = multiprocessing.Pipe()
        # Only a fork has the tokenizer at once, and without importing anything again.
        helper = multiprocessing.get_context("fork").Process(target=_serve, args=(theirs, render), daemon=True)
        helper.start()
        theirs.close()
        return helper, ours

    def _stop(self) -> None:
        """Ends the helper, if it is this process's."""
        if self._helper is not None and self._process == os.getpid():
            helper, connection = self._helper
            self._helper = None
            connection.close()
            helper.kill()
            helper.join()

    def _forget_ended(self) -> None:
        """Gives back what a helper has left that ended by itself, unless it is being talked to."""
        if self._process == os.getpid() and self._lock.acquire(blocking=False):
            try:
                if self._helper is not None and not self._helper[0].is_alive():
                    self._stop()
            finally:
                self._lock.release()

    def __del__(self, suppress: Any = contextlib.suppress):
        with suppress(Exception):  # the interpreter may be about to end, and its modules be gone
            self._stop()


@functools.lru_cache(maxsize=SHARED)
def renderer_of(template: str, special_tokens: str) -> BoundedRenderer:
    """Returns the renderer that is shared by all that render one template, with the same special tokens."""
    return BoundedRenderer()


atexit.register(renderer_of.cache_clear)  # while there still is what ends a helper


def _serve(connection: Connection, render: Render) -> None:
    """Answers requests until there are none any more. This is what the helper does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it as well, and its parent ends it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Files, locks and sockets of the parent are not to be kept open.
    os.closerange(3, connection.fileno())
    os.closerange(connection.fileno() + 1, 1 << 16)
    with contextlib.suppress(OSError, ValueError):  # there is no /proc elsewhere than on Linux
        taken = int(Path("/proc/self/statm").read_text("utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY_BYTES, resource.RLIM_INFINITY))
    while connection.poll(IDLE_SECONDS):
        try:
            conversations, options = connection.recv()
        except EOFError:
            return
        # If the parent is killed, nobody else ends a template that never does.
        soft = int(time.process_time()) + SECONDS + 1
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        kind, content, is_refusal = _reply(conversations, options, render)
        connection.send_bytes(json.dumps([kind, is_refusal]).encode())
        connection.send_bytes(content.encode(errors="surrogatepass"))


def _reply(conversations: list[Conversation], options: dict[str, Any], render: Render) -> Reply:
    """Renders conversations, or says why they cannot be rendered."""
    given = sum(len(str(message.get("content") or "")) for messages in conversations for message in messages)
    limit = LENGTH + LENGTH_FACTOR * given
    try:
        texts = render(conversations, **options)
        if sum(map(len, texts)) > limit:
            return "length", f"{limit:,}", False
        return None, json.dumps(texts, ensure_ascii=False), False
    except BaseException as error:  # a template's code may raise anything
        return type(error).__name__, str(error)[:10_000], isinstance(error, TemplateError)
