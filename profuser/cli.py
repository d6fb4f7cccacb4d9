"""The command line: `profuser COMMAND`, which does the same as `python -m profuser.COMMAND`.

A failure prints one line and ends the process with an exit code: 0 all went well, 1 a failure while running, 2 wrong usage or
recipe, 3 invalid data or store, 4 a loss that is not finite, 5 out of memory, 75 saved and ended on SIGTERM, 130 Ctrl-C. Nothing
heavy is imported here, so that a command can read its command line before it imports torch.
"""

from __future__ import annotations

import difflib
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from profuser import stopping
from profuser.errors import (
    ConfigError,
    DataError,
    Interrupted,
    OutOfMemoryError,
    ProfuserError,
    Stopped,
    first_line,
    is_lack_of_memory,
)

COMMANDS = {
    "train": "prepare what is missing, fuse, score, report; without arguments the bundled demo",
    "prepare": "only the store: responses, votes, distributions, alignment",
    "evaluate": "score a finished run again, also on new data, or any models on benchmarks",
    "report": "draw the report of a finished run again, or set several runs side by side",
    "doctor": "how two tokenizers align on a text; an example in every chat template; which sources are worth combining",
    "generate": "let the sources answer prompts together, without training",
    "merge": "merge models of one architecture into one, without training",
    "store": "what a store holds (info, verify), as a data set (export), beside another (diff); DistillKit's captures (distillkit)",
}

EXTRAS = {
    "deepspeed": "deepspeed",
    "gguf": "gguf",
    "peft": "lora",
    "bitsandbytes": "qlora",
    "reasoning_gym": "recipes",
    "lm_eval": "benchmarks",
}
"""Packages that an extra of its own installs, each with that extra. The extra `train` installs all others."""


def main() -> None:
    """Runs the console script `profuser`: prints the help or the version, or runs a command."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print(
            "usage: profuser COMMAND [--help] ...\n\n" + "\n".join(f"  {c:<{width}}  {t}" for c, t in COMMANDS.items())
        )
        sys.exit(0)
    if arguments[0] == "--version":
        from profuser import __version__

        print(__version__)
        sys.exit(0)

    def command(argv: list[str]) -> None:
        name = argv[0]
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            hint = f"did you mean {near[0]}?" if near else "`profuser --help` says what each does"
            raise ConfigError(f"a command must be one of {', '.join(COMMANDS)}, got {name}; {hint}")
        importlib.import_module(f"profuser.{name}.__main__").main(argv[1:])

    # A recipe may name functions of modules in the working directory, which `python -m` finds by itself.
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    main_of(command)


def main_of(command: Callable[[list[str]], None], argv: Sequence[str] | None = None) -> None:
    """Runs a command. If it fails, one line says why, and the process ends with the exit code of that failure.

    Args:
        argv: the command's arguments; None takes those of the process.
    """

    quiet_libraries()
    # What a terminal's encoding lacks is escaped, so that no answer ends in an error.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with stopping.heard():
            command(list(sys.argv[1:] if argv is None else argv))
    except ProfuserError as error:
        fail(error)
    except BrokenPipeError:  # the reader of the output, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Stopped, KeyboardInterrupt) as error:
        stop = (
            error if isinstance(error, Stopped) else Interrupted()
        )  # something else than a signal may raise the latter
        sys.stderr.write(stopping.line_of(stop))
        sys.exit(stop.exit_code)
    except Exception as error:
        fail(explained(error))
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how a library written in Rust gives up; it is no Exception
            raise
        fail(
            DataError(
                f"a tokenizer or a file of weights could not be used ({first_line(error)}); copy or download it again"
            )
        )


def quiet_libraries() -> None:
    """Silences transformers and the libraries around it. What matters of their messages becomes an error of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    if (transformers := sys.modules.get("transformers")) is not None:  # too late for the environment: it has been read
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
    # peft imports bitsandbytes for every adapter, where that is installed. On some CPUs it looks for a product in the package `kernels`
    # then, and warns that it is not there: a clone's folder of that name, or nothing, is. We switch this product off (load_quantized).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # A user can do nothing about names that transformers will drop, and that peft or we still use.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def explained(error: Exception) -> ProfuserError:
    """Turns what a library raised into an error of ours with one line. A defect of our own is raised again as it is."""
    if isinstance(error, OSError):
        return ProfuserError(
            f"{error.filename or 'a file'}: {error.strerror or error}; check the path, its permissions and the disk"
        )
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("profuser"):
        package = error.name.partition(".")[0]
        return ConfigError(
            f"this command needs the package {package}, which is not installed; run "
            f"`pip install 'profuser[{EXTRAS.get(package, 'train')}]'`"
        )
    # The types of torch and safetensors are recognised by their names, so that neither is imported only to ask for them.
    kind = f"{type(error).__module__}.{type(error).__name__}"
    if isinstance(error, MemoryError):
        return OutOfMemoryError(
            "out of memory; a file may be far larger than it should be, or there is too little memory"
        )
    if is_lack_of_memory(error):
        return OutOfMemoryError(
            f"out of memory ({first_line(error)}); lower generation.batch_size, capture.batch_size, capture.tokens_per_batch, "
            "decode.batch_size, optim.micro_batch_size, optim.tokens_per_micro_batch or data.max_length, or set "
            "optim.gradient_checkpointing: true"
        )
    if "DistBackendError" in kind or (isinstance(error, RuntimeError) and "gloo" in str(error)):
        return ProfuserError(
            "the other processes of a run must live as long as it, one has ended; its own line says why"
        )
    if "SafetensorError" in kind:
        return ProfuserError(f"a file could not be written or read ({error}); check the disk")
    raise error


def fail(error: ProfuserError) -> NoReturn:
    """Prints an error and ends the process with its exit code."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
