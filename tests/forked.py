"""Runs a program beside this file in several processes that are one group, as torch.distributed.run does.

    python tests/forked.py PROCESSES NAME ARGUMENTS...

The module NAME is imported once, with all that it imports, and its `main` is then called in forks of this process. Imports take
most of the time of such a program, and torch.distributed.run makes them once more in every process and in its own.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys

import torch._dynamo  # noqa: F401  (operators import it when they are first called)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def main() -> None:
    processes, name = int(sys.argv[1]), sys.argv[2]
    del sys.argv[1:3]
    program = importlib.import_module(name)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(processes)}
    forks = []
    for rank in range(processes):
        fork = os.fork()
        if not fork:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            program.main()
            return
        forks.append(fork)
    while forks:
        fork, status = os.wait()
        forks.remove(fork)
        if code := os.waitstatus_to_exitcode(status):
            for other in forks:  # they would wait for it
                os.kill(other, signal.SIGKILL)
            sys.exit(abs(code))


if __name__ == "__main__":
    main()
