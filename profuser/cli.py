"""What every command shares: one line and a documented exit code for each failure.

0 ok, 1 runtime, 2 usage or recipe, 3 data or store invalid, 4 non-finite, 5 out of memory, 75 saved on SIGTERM, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable

import torch
import transformers
from safetensors import SafetensorError

from profuser.errors import OutOfMemoryError, ProfuserError, Terminated


def main_of(command: Callable[[list[str]], None]) -> None:
    """Run a command with sys.argv and end the process with its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what matters of it is an error of ours, in one line

    def terminate(*_) -> None:
        raise Terminated("stopped by SIGTERM; what was finished is kept, the same command goes on from there")

    signal.signal(signal.SIGTERM, terminate)
    try:
        command(sys.argv[1:])
    except torch.OutOfMemoryError as error:
        fail(
            OutOfMemoryError(
                f"out of memory ({str(error).splitlines()[0]}); lower optim.micro_batch_size, capture.batch_size or "
                "data.max_length, or set optim.gradient_checkpointing: true"
            )
        )
    except (ProfuserError, Terminated) as error:
        fail(error)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(
            ProfuserError(
                f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the disk"
            )
        )
    except SafetensorError as error:
        fail(ProfuserError(f"a file could not be written or read ({error}); check the disk"))
    except KeyboardInterrupt:
        print("\ninterrupted; what was finished is kept, the same command goes on from there", file=sys.stderr)
        sys.exit(130)


def fail(error: ProfuserError | Terminated) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
