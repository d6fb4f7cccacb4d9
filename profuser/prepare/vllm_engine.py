"""Lets vLLM answer, in a process of its own and, if need be, in a Python of its own, so that its torch need not be ours.

Prompts go to it as the tokens that transformers would get, and tokens come back, so that nothing depends on how vLLM renders a chat or
spells a token.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch

from profuser.errors import ConfigError, ProfuserError
from profuser.prepare import vllm_worker

SECONDS_TO_END = 20
"""How long an engine may take to end when it is not needed any more."""
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and accelerate launch say to the processes that they start."""


class VllmProcess:
    """An engine that runs. It is used as a context manager.

    Args:
        python: the Python that has vllm; None means this one. engine: the arguments of vLLM's engine.
    Raises:
        ProfuserError: the engine does not start.
    """

    def __init__(self, python: str | None, engine: dict[str, Any]):
        self.python, self.engine = python or sys.executable, engine

    def __enter__(self) -> VllmProcess:
        log, self.log = tempfile.mkstemp(prefix="profuser-vllm-", suffix=".log")
        environment = own_environment(os.environ)
        # One process is enough, and ends with its parent. On a CPU vLLM would take a share of the machine's memory.
        environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "PYTHONUNBUFFERED": "1"}
        environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        environment.setdefault("VLLM_NO_USAGE_STATS", "1")
        if self.python != sys.executable:
            environment.pop("PYTHONPATH", None)  # it names packages for this Python
        self.process = subprocess.Popen(
            [self.python, str(Path(vllm_worker.__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for us, who end it
        )
        os.close(log)
        try:
            self._write([{"engine": self.engine}])
            self.version = self._read()["ready"]
        except BaseException:
            self._end()
            raise
        return self

    def answers(self, requests: Iterable[dict[str, Any]]) -> Generator[dict[str, Any]]:
        """Sends requests, and yields the answers as they come (profuser/prepare/vllm_worker.py says what they look like)."""
        waiting = {request["id"]: request for request in requests}
        # The worker reads whatever it does, so that this never waits for long.
        sending = threading.Thread(target=self._write, args=(list(waiting.values()),), daemon=True)
        sending.start()
        while waiting:
            answer = self._read()
            del waiting[answer["id"]]
            yield answer
        sending.join()

    def _write(self, lines: list[dict[str, Any]]) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended, which the reader finds out
            for line in lines:
                self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self._fail(f"it ended with {f'signal {-code}' if code < 0 else f'code {code}'}: {self._last_line()}")
        message = json.loads(line)
        if "error" in message:
            self._fail(message["error"])
        return message

    def _fail(self, reason: str) -> NoReturn:
        self.failed = True
        raise ProfuserError(
            f"vllm of {self.python} must answer, it failed ({reason}); its output is in {self.log}; mend that, or set "
            "generation.engine: transformers"
        )

    def _last_line(self) -> str:
        lines = [
            line.strip()
            for line in Path(self.log).read_text(encoding="utf-8", errors="replace").splitlines()
            if line.strip()
        ]
        return lines[-1][:300] if lines else "it printed nothing"

    failed = False

    def _end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.close()
        try:
            self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()
        if not self.failed:
            Path(self.log).unlink(missing_ok=True)

    def __exit__(self, *_: object) -> None:
        self._end()


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for an engine of one's own: where a launcher has started several of us, each has its own GPU.

    What the launcher says to its processes is left out, for vLLM would take itself for one of them.
    """
    own = {
        name: value
        for name, value in environment.items()
        if name not in LAUNCHER and not name.startswith(("TORCHELASTIC_", "ROLE_", "GROUP_"))
    }
    if "LOCAL_RANK" in environment and torch.cuda.is_available():
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(n) for n in range(torch.cuda.device_count())]
        own["CUDA_VISIBLE_DEVICES"] = names[torch.cuda.current_device()]
    return own


def engine_arguments(location: str, options: dict[str, Any], dtype: torch.dtype, max_length: int) -> dict[str, Any]:
    """Returns the arguments of vLLM's engine for a model.

    Args:
        location, options: as for transformers' loaders. max_length: the longest sequence in tokens.
    """
    return {
        "model": location,
        "revision": options["revision"],
        "trust_remote_code": options["trust_remote_code"],
        "dtype": str(dtype).removeprefix("torch."),
        "max_model_len": max_length,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the model's own would change the sampling
        "enforce_eager": not torch.cuda.is_available(),  # to compile a graph takes longer than most of what is asked on a CPU
        "disable_log_stats": True,
    }


def has_vllm(python: str | None) -> bool:
    """Whether a Python has vllm; None means this one.

    Raises:
        ConfigError: there is no such Python.
    """
    if python is None:
        return importlib.util.find_spec("vllm") is not None
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    try:
        return subprocess.run([python, "-c", look], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise ConfigError(
            f"generation.python must be a Python, got {python} ({error.strerror}); name its program, such as vllm-env/bin/python"
        ) from None
