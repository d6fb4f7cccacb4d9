"""Says who uses a store or a run directory, so that two processes never get in each other's way.

Everyone who uses a directory keeps a lease in its hidden folder `.leases`: `NAME.json` says on which host and in which process
it is used, since when, with which settings, and in which of three ways. Many may read a directory, and many may work in it
together, which adds to it and takes nothing away; who changes it otherwise must be alone. A process with the same settings that
finds no place waits; one with other settings is refused, because it would take away what the others use.

Those who work together divide the work by claims. A claim is the name of a piece of work, and stands in the lease of the process
that does it. It therefore ends with the lease: what a lost process was doing is free for the others.

The lock on `NAME.lock` beside the lease ends with its process, however that ends. A lease is therefore left over where its
lock is free and it was made on this kernel: neither a reboot, nor a process id that was given to another process, nor another
container matters. From another kernel, as on a shared file system whose locks may not reach so far, a lease counts until it has
not been renewed for EXPIRES_SECONDS. Whoever finds a lease that is left over takes it away.

Commands that only look at a directory need no lease.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import math
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout

from profuser.errors import ConfigError, DataError
from profuser.store import files
from profuser.store.files import as_json, write_atomic
from profuser.store.processes import boot
from profuser.typed import COUNT, Rule, read_json

FOLDER = ".leases"
"""The name of the folder with the leases."""
RENEWED_SECONDS = 20
"""How often a process renews its lease."""
EXPIRES_SECONDS = 90
"""A lease from another kernel or mount is left over when it has not been renewed for so long."""
POLL_SECONDS = 0.5
"""How often a process that waits looks again."""
READINGS, READ_AGAIN_SECONDS = 5, 0.05
"""How often a lease is read until it must be none, and how long the next time is waited for."""
ATTEMPTS = 1000
"""How often the folder of the leases may be removed by others just as it is entered, before something else must be wrong."""

Directory = Literal["store", "run"]
OPTIONS: Mapping[Directory, str] = {"store": "--store", "run": "--output"}
"""The option of a command that gives another directory."""

Settings = dict[str, Any]
Differing = Callable[[Settings, Settings], list[str]]
"""Returns the names of the settings in which two leases on a directory differ."""

Use = Literal["reads", "works", "alone"]
"""How a directory is used: it is read; it is added to, together with others; or it is changed by one alone."""


def _is_unicode(value: object) -> bool:
    """Whether a value is a text that can be printed; half of a surrogate pair cannot."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


UNICODE = Rule("Unicode text", _is_unicode)

LEASE = {
    "host": UNICODE,
    "boot": str,
    "device": COUNT,
    "pid": COUNT,
    "since": UNICODE,
    "use": Rule("reads, works or alone", lambda x: x in get_args(Use)),
    "claim": str,
    "settings": {},
}
"""The shape of a lease's file."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that uses a directory, as its lease describes it.

    boot: the kernel that it runs on, by the id of its boot. device: the number that this kernel gives the directory's file system.
    since: when it took the lease, in ISO format.
    use: how it uses the directory. claim: the piece of work that it does, or "". settings: with what it uses the directory.
    """

    host: str
    boot: str
    device: int
    pid: int
    since: str
    use: Use
    claim: str
    settings: Settings

    def __str__(self) -> str:
        there = "" if self.boot == boot() else f"; if it has ended, this is noticed after {EXPIRES_SECONDS} s"
        return f"process {self.pid} on {self.host} (since {self.since.replace('T', ' ')}{there})"


class Lease:
    """This process's lease on a directory. `hold` makes one; without a path it stands for a directory that is only readable."""

    def __init__(self, holder: Holder, directory: Path, path: Path | None):
        self._holder, self._directory, self._path = holder, directory, path
        self._lock = FileLock(_lock_of(path)) if path is not None else None
        self._ended = threading.Event()

    @property
    def use(self) -> Use:
        """How this process uses the directory."""
        return self._holder.use

    def share(self, use: Use) -> None:
        """Says that the directory is from now on used in a way that leaves others with the same settings more room."""
        self._say(replace(self._holder, use=use))

    def claim(self, names: Iterable[str], is_done: Callable[[str], bool]) -> str | None:
        """Claims a piece of work, and gives up the claim before it, which must be done by now.

        Args:
            names: the pieces of work in their order. is_done: whether one is done; it is called while nobody else can claim.
        Returns:
            The first that is not done and that nobody else has claimed; None where there is none.
        """
        with _alone(self._directory):
            claimed = {other.claim for other in _holders(self._directory) if other != self._holder}
            found = next((name for name in names if name not in claimed and not is_done(name)), None)
            self._say(replace(self._holder, claim=found or ""))
        return found

    def _say(self, holder: Holder) -> None:
        """Writes into the lease what has become of it."""
        if self._path is not None and holder != self._holder:
            self._holder = holder
            _write(self._path, holder)

    def _begin(self) -> None:
        """Writes the lease and renews it from then on. The caller is alone at the leases."""
        assert self._path is not None
        assert self._lock is not None
        self._lock.acquire(timeout=0)
        _write(self._path, self._holder)
        threading.Thread(target=self._renew, daemon=True).start()

    def _renew(self) -> None:
        assert self._path is not None
        while not self._ended.wait(RENEWED_SECONDS):
            with contextlib.suppress(OSError):  # a directory that cannot be reached for a moment
                os.utime(self._path)

    def _end(self) -> None:
        """Takes the lease away. The caller is alone at the leases."""
        assert self._path is not None
        assert self._lock is not None
        self._ended.set()
        _remove(self._path)
        self._lock.release()


@contextlib.contextmanager
def hold(
    directory: Path, what: Directory, settings: Mapping[str, Any], differing: Differing, *, use: Use
) -> Generator[Lease]:
    """Holds a directory, which is made if it is not there, until the end of a `with` block.

    While others with the same settings use the directory in a way that does not allow it, this waits, and prints that it does.
    Who wants to work where nobody works yet is alone at first, puts the directory in order, and then lets others in by `share`.

    Args:
        what: what the directory is.
        settings: what must be the same for all who use the directory at a time, as it would be read back from JSON.
        differing: compares these settings with another process's.
        use: how the directory will be used.

    Raises:
        ConfigError: the directory is in use with other settings.
    """
    own = Holder(
        host=socket.gethostname(),
        boot=boot(),
        device=0,  # there may be no directory yet
        pid=os.getpid(),
        since=datetime.now().isoformat(timespec="seconds"),
        use=use,
        claim="",
        settings=dict(settings),
    )
    is_new = not directory.exists()
    try:
        lease = _enter(directory, what, own, differing)
    except OSError as error:
        # What cannot be written to can still be read.
        if use != "reads" or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        yield Lease(own, directory, None)
        return
    try:
        yield lease
    finally:
        with contextlib.suppress(FileNotFoundError), _alone(directory):
            lease._end()
        if is_new:
            with contextlib.suppress(OSError):  # unless something was put into it
                directory.rmdir()


def set_aside(directory: Path, what: Directory) -> Path | None:
    """Renames an old directory out of the way, for --fresh, and returns its new path.

    Raises:
        ConfigError: the directory is in use.
    """
    if not directory.exists():
        return None
    with _alone(directory):
        if holders := _holders(directory):
            raise ConfigError(
                f"--fresh needs a {what} that is not in use, {directory} is in use by {holders[0]}; wait for its end, stop it, "
                f"or give another {OPTIONS[what]}"
            )
        aside = files.set_aside(directory)
        assert aside is not None
        shutil.rmtree(_folder(aside), ignore_errors=True)
    return aside


def _enter(directory: Path, what: Directory, own: Holder, differing: Differing) -> Lease:
    """Takes a lease as soon as there is a place for it."""
    waits = False
    while True:
        with _alone(directory):
            others = _holders(directory)
            for other in others:
                if keys := differing(other.settings, own.settings):
                    raise ConfigError(
                        f"{what} {directory} is in use with other settings ({', '.join(keys)} differ) by {other}; wait for its "
                        f"end, stop it, or give another {OPTIONS[what]}"
                    )
            if (use := _room(own.use, [other.use for other in others])) is not None:
                path = _folder(directory) / f"{own.host}-{own.pid}-{uuid.uuid4().hex[:8]}.json"
                lease = Lease(replace(own, device=_device(directory), use=use), directory, path)
                lease._begin()
                if use == "works":
                    worker = next(other for other in others if other.use == "works")
                    print(f"{what} {directory} is being made by {worker}: sharing the work", flush=True)
                return lease
        if not waits:
            print(f"{what} {directory} is in use with the same settings by {others[0]}: waiting for it", flush=True)
            waits = True
        time.sleep(POLL_SECONDS)


def _room(wanted: Use, others: Sequence[Use]) -> Use | None:
    """Returns how a directory may be used that others use in these ways; None where there is no room now."""
    if "alone" in others:
        return None
    if wanted == "reads":
        return "reads"
    if not others:
        return "alone"
    return "works" if wanted == "works" and "works" in others else None


@contextlib.contextmanager
def _alone(directory: Path) -> Generator[None]:
    """Keeps other processes away from the leases of a directory. The folder of the leases goes when the last of them has gone."""
    folder = _folder(directory)
    door = FileLock(folder / "door")
    for attempt in itertools.count(1):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            door.acquire(poll_interval=0.02)
            break
        except (FileNotFoundError, FileExistsError):
            # Whoever was here before has just removed the folder: before the door was opened, or while mkdir looked at it.
            if attempt == ATTEMPTS:
                raise
    try:
        yield
    finally:
        # A process that waits for a lock on a file that is no longer there notices it, and opens the new one (filelock 4).
        is_last = not list(folder.glob("*.json"))
        if is_last:
            shutil.rmtree(folder, ignore_errors=True)
        door.release()
        if is_last:
            with contextlib.suppress(OSError):  # over a network, an open file keeps its folder until it is closed
                folder.rmdir()


def _holders(directory: Path) -> list[Holder]:
    """Returns who uses a directory. Leases that are left over are removed. The caller is alone at the leases."""
    door = _folder(directory) / "door"
    os.utime(door)
    now = door.stat().st_mtime  # by the clock of the file system, which also dates the leases
    holders = []
    for path in sorted(_folder(directory).glob("*.json")):
        holder, lock = _read(path), FileLock(_lock_of(path))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            is_left_over = False
        else:
            try:
                reached = holder is not None and (holder.boot, holder.device) == (boot(), _device(directory))
                is_left_over = reached or now - _renewed(path) > EXPIRES_SECONDS
                if is_left_over:
                    _remove(path)
            finally:
                lock.release()
        if holder is not None and not is_left_over:
            holders.append(holder)
    return holders


def _write(path: Path, holder: Holder) -> None:
    """Writes a lease. It need not outlive a power cut, after which it would not count."""
    write_atomic(path, as_json(asdict(holder)), sync=False)


def _read(path: Path) -> Holder | None:
    """Reads a lease. It returns None for a file that is none, or that is no longer there.

    A lease that has just been written anew may for a moment seem to be missing or empty on another machine.
    """
    for attempt in range(READINGS):
        try:
            record = read_json(path, LEASE, fix="delete it if no process uses the directory")
        except DataError:
            time.sleep(READ_AGAIN_SECONDS if attempt < READINGS - 1 else 0)
        else:
            return Holder(**{name: record[name] for name in Holder.__slots__})
    return None


def _renewed(path: Path) -> float:
    """Returns when a lease was renewed, by the clock of the file system; long ago if it has just ended."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return -math.inf


def _remove(path: Path) -> None:
    """Deletes the two files of a lease."""
    path.unlink(missing_ok=True)
    _lock_of(path).unlink(missing_ok=True)


def _folder(directory: Path) -> Path:
    """Returns the folder that holds the leases on a directory."""
    return directory / FOLDER


def _device(directory: Path) -> int:
    """Returns the number of a directory's file system. Two mounts may be two file systems to the kernel, each with locks of its own."""
    return _folder(directory).stat().st_dev


def _lock_of(lease: Path) -> Path:
    """Returns the file whose lock lives as long as the process of a lease."""
    return lease.with_suffix(".lock")
