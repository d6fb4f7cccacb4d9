"""The errors that a user can meet, each with the exit code that its command ends with.

A message is one line with the rule, the value that broke it, and the fix.
"""

import traceback
from pathlib import Path


class ProfuserError(Exception):
    """Any failure that a command reports in one line instead of a traceback (exit code 1)."""

    exit_code = 1


class ConfigError(ProfuserError):
    """The recipe or the command line contradicts itself or names something unknown (exit code 2)."""

    exit_code = 2


class DataError(ProfuserError):
    """A model, data file or store is missing or invalid (exit code 3)."""

    exit_code = 3


class NonFiniteError(ProfuserError):
    """A loss or gradient is NaN or infinite (exit code 4)."""

    exit_code = 4


class OutOfMemoryError(ProfuserError):
    """The device ran out of memory (exit code 5)."""

    exit_code = 5


class Stopped(BaseException):
    """A signal came. What was finished is saved, and the same command goes on from there.

    Like KeyboardInterrupt this is not an Exception, so that no handler of errors catches it.
    """

    exit_code = 1
    happened = ""
    kept = "what was finished is kept, the same command goes on from there"

    def __init__(self, kept: str | None = None):
        super().__init__(f"{self.happened}; {kept or self.kept}")


class Terminated(Stopped):
    """SIGTERM came (exit code 75)."""

    exit_code = 75
    happened = "stopped by SIGTERM"


class Interrupted(Stopped, KeyboardInterrupt):
    """Ctrl-C was pressed, which is SIGINT (exit code 130)."""

    exit_code = 130
    happened = "interrupted"


def first_line(error: BaseException) -> str:
    """Returns the first line of another library's error message, or the error's type where it has no message.

    A line that only announces the next one is followed by it.
    """
    line, *others = str(error).strip().splitlines() or [type(error).__name__]
    return (f"{line} {others[0].strip()}" if others and line.endswith(":") else line)[:300]


def in_own_function(error: BaseException) -> str:
    """Says what a function of the user's own raised, and in which line of which file, if not where it was called."""
    _, *frames = traceback.extract_tb(error.__traceback__)
    where = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{where}: {first_line(error)}"


LACKS_OF_MEMORY = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",  # of pinned memory
    "Triton Error [CUDA]: out of memory",  # of a kernel as it is loaded
    "CUBLAS_STATUS_ALLOC_FAILED",  # of a library's own
)
"""What stands in the texts of such errors."""


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine ran out of memory.

    torch's and Triton's errors are recognised by their names and texts, so that torch need not be imported only to ask. For a lack of
    a CPU's memory, and of a GPU's outside of its own allocator, they raise a plain RuntimeError.
    """
    kind = f"{type(error).__module__}.{type(error).__name__}"
    return (
        isinstance(error, MemoryError)
        or (kind.startswith("torch") and "OutOfMemoryError" in kind)
        or (isinstance(error, RuntimeError) and any(text in str(error) for text in LACKS_OF_MEMORY))
    )


def in_short(value: object) -> str:
    """Returns a value as Python spells it, in one line and not too long for a message."""
    return " ".join(repr(value).split())[:200]
