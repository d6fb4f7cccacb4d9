"""Stops a command on SIGTERM or Ctrl-C with one line and its exit code, from the first line of our own code on.

A signal acts in one of three ways:
- At once: the line is written and the process ends. It is so while modules are imported and inputs are opened. Nothing has
  been begun then that would have to be put in order, and a library may swallow an exception that is raised while it is imported.
- Raised: `Terminated` or `Interrupted` is raised in the main thread, and what is held is released on its way up. If a library
  swallows the exception, it is raised again.
- Noted, for someone who asks for it: the trainer, which saves its state at the end of a step.

A second signal ends the process at once.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import weakref

from profuser.errors import Interrupted, Stopped, Terminated

TYPE_CHECKING = False  # as in `typing`, whose import would take longer than all the others here
if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from typing import Any, Literal, NoReturn

    Way = Literal["at once", "raised", "noted"]

KINDS: dict[int, type[Stopped]] = {signal.SIGTERM: Terminated, signal.SIGINT: Interrupted}
"""The signals, and what is raised for each."""

AGAIN_SECONDS, AGAIN_TIMES = 0.02, 3
"""How long after a library has swallowed an exception it is raised again, and how often before the process ends at once."""


class _State:
    """What the handler knows.

    way: how a signal acts. asked: the first signal that came. heard: whether the command has ended because of it.
    swallowed: how often a library has swallowed its exception. again: whether the next signal is the same one once more.
    said: whether the line has been written. process: the process that the handler is for, and not for a fork of it.
    """

    def __init__(self, way: Way):
        self.way: Way = way
        self.asked: int | None = None
        self.heard = self.again = self.said = False
        self.swallowed = 0
        self.process = os.getpid()


_state: _State | None = None


def begin() -> None:
    """Makes signals end this process at once, if it is a command of ours, run by `python -m` or by the script `profuser`.

    The package calls this before it does anything else.
    """
    # Python keeps the command line as it was given. While it looks for the module behind -m, argv[0] stands for that.
    argv = sys.argv
    script = os.path.basename(argv[0])
    module = sys.orig_argv[-len(argv)].removeprefix("-m") if script == "-m" else script
    folder, _, rest = module.partition(".")
    if folder == "profuser" and ("." not in rest or rest.startswith("experiments.")):
        _install("at once")
        atexit.register(_ignore)  # what is registered first runs last


def _install(way: Way) -> dict[int, Any]:
    """Installs the handlers and returns the old ones. A signal that the process was told to ignore stays ignored."""
    global _state
    _state = _State(way)
    old = {}
    for number in KINDS:
        old[number] = signal.getsignal(number)
        if old[number] != signal.SIG_IGN:
            signal.signal(number, _act)
    sys.unraisablehook = _unraisable
    threading.excepthook = _in_thread
    return old


def _restore(old: dict[int, Any]) -> None:
    """Puts the handlers back that were there before."""
    global _state
    _state = None
    sys.unraisablehook, threading.excepthook = sys.__unraisablehook__, threading.__excepthook__
    for number, handler in old.items():
        signal.signal(number, handler)


@contextlib.contextmanager
def heard() -> Generator[None]:
    """Raises at the end of a `with` block what a signal has asked for, whatever a library has made of it in between.

    Raises:
        Terminated, Interrupted: a signal came.
    """
    old = _install("raised") if _state is None else {}
    try:
        yield
    except BaseException as error:
        if (asked := _hear()) is None or isinstance(error, Stopped):
            raise
        raise asked from None
    else:
        if (asked := _hear()) is not None:
            raise asked
    finally:
        if old:
            _restore(old)


def _hear() -> Stopped | None:
    """Returns what a signal has asked for, if one came. From then on a signal ends the process at once."""
    assert _state is not None
    _state.way, _state.heard = "at once", True
    return None if _state.asked is None else KINDS[_state.asked]()


@contextlib.contextmanager
def working() -> Generator[None]:
    """Makes signals raise in a `with` block, in which there is something to put in order when the process is stopped."""
    with _in_way("raised"):
        yield


@contextlib.contextmanager
def noted() -> Generator[Callable[[], Stopped | None]]:
    """Only notes signals in a `with` block. It gives a function that returns what one has asked for, if one came.

    Raises:
        Terminated, Interrupted: a signal came that nobody has asked about.
    """
    old = _install("noted") if _state is None else {}
    state = _state
    assert state is not None
    try:
        with _in_way("noted"):
            yield lambda: None if state.asked is None else KINDS[state.asked]()
        if state.asked is not None:
            raise KINDS[state.asked]()
    finally:
        if old:
            _restore(old)


@contextlib.contextmanager
def _in_way(way: Way) -> Generator[None]:
    """Makes signals act in this way in a `with` block, if there are handlers."""
    if _state is None:
        yield
        return
    before, _state.way = _state.way, way
    try:
        yield
    finally:
        if _state is not None:
            _state.way = "at once" if _state.heard else before


def _act(number: int, _frame: object) -> None:
    """Handles a signal."""
    state = _state
    assert state is not None
    if (
        os.getpid() != state.process
    ):  # a fork, which has nothing to say; the trainer ends its own when it has saved its state
        if state.way == "noted":
            return
        os._exit(KINDS[number].exit_code)
    again, state.again = state.again, False
    if state.way == "at once" or (state.asked is not None and not again):
        _end(number)
    state.asked = number
    if state.way == "raised":
        # When nothing refers to the exception any more, it has been swallowed, or main_of has made its line of it.
        error = KINDS[number]()
        weakref.finalize(error, _swallowed, number).atexit = False
        try:
            raise error
        finally:
            del error


def _swallowed(number: int) -> None:
    """Raises an exception again that nobody refers to any more."""
    state = _state
    if state is None or state.heard:
        return
    state.swallowed, state.again = state.swallowed + 1, True
    if state.swallowed > AGAIN_TIMES:
        _end(number)
    timer = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _end(number: int) -> NoReturn:
    """Ends the process, with the line unless it has been written."""
    with contextlib.suppress(Exception):  # a stream may be closed, or be in use by what the signal has interrupted
        sys.stdout.flush()
    kind = KINDS[number]
    with contextlib.suppress(OSError):
        os.write(2, line_of(kind()).encode())
    os._exit(kind.exit_code)


def line_of(error: Stopped) -> str:
    """Returns the line of a signal. Of a second one it is empty."""
    if _state is not None:
        if _state.said:
            return ""
        _state.said = True
    # A terminal shows ^C, behind which a new line begins.
    prefix = "\n" if isinstance(error, Interrupted) and os.isatty(2) else ""
    return f"{prefix}{'error: ' if isinstance(error, Terminated) else ''}{error}\n"


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Says nothing about an exception of a signal that came where nothing can be raised. It is raised again elsewhere."""
    if not isinstance(found.exc_value, Stopped):
        sys.__unraisablehook__(found)


def _in_thread(found: threading.ExceptHookArgs) -> None:
    """Says nothing about a thread that fails because the process is being stopped."""
    if _state is None or _state.asked is None:
        threading.__excepthook__(found)


def _ignore() -> None:
    """Ignores signals while the interpreter is taken down, where they would end the process in another way.

    Python then replaces handlers by the system's own, but leaves alone what is ignored.
    """
    for number in KINDS:
        signal.signal(number, signal.SIG_IGN)
