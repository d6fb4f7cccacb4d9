"""SIGTERM and Ctrl-C end every command with 75 and 130 and one line, from the first line of our own code to the last.

The processes here are real. `python -m pytest tests/test_stopping.py -m long` sends forty signals at seeded moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from command_runs import run, without_pictures, without_plan
from conftest import ROOT, small_run

from profuser.cli import COMMANDS, main_of
from profuser.errors import Interrupted, Terminated
from profuser.stopping import noted, working

CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}
LINES = {signal.SIGTERM: f"error: {Terminated()}\n", signal.SIGINT: f"{Interrupted()}\n"}
SIGNALS = pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)


def start(*arguments: str, path: str = str(ROOT), ctrl_c: signal.Handlers = signal.SIG_DFL) -> subprocess.Popen:
    """Starts Python in a session of its own. A shell's `&` lets a process ignore SIGINT, and a child inherits that."""
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, ctrl_c),
    )


def end(process: subprocess.Popen) -> tuple[int, str]:
    """Waits for the end of a process, and returns its exit code and what it wrote to stderr."""
    try:
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, err


def outcome(number: int, body: str) -> tuple[int, str]:
    """Runs a command with this body, in which `hit()` sends the signal to the process itself."""
    lines = textwrap.indent(textwrap.dedent(body), "    ")
    program = (
        "import os, signal, sys, threading, time\n"
        "from profuser.cli import main_of\n"
        "from profuser.stopping import noted, working\n"
        f"def hit(): os.kill(os.getpid(), {number:d})\n"
        f"def command(argv):\n{lines}\n"
        "main_of(command, [])"
    )
    return end(start("-c", program))


@SIGNALS
@pytest.mark.parametrize(
    "body",
    [
        "hit(); time.sleep(9)",
        # What is swallowed is raised again.
        """
        try: hit(); time.sleep(9)
        except BaseException: pass
        time.sleep(9)
        """,
        # An exception of a library's own takes its place.
        """
        try: hit(); time.sleep(9)
        except BaseException as error: raise ImportError("broken") from error
        """,
        """
        try: hit(); time.sleep(9)
        except BaseException: sys.exit(1)
        """,
        # It is swallowed in another form.
        """
        try:
            try: hit(); time.sleep(9)
            except BaseException as error: raise ImportError("broken") from error
        except ImportError: pass
        time.sleep(9)
        """,
        # It is swallowed again and again.
        """
        while True:
            try: hit(); time.sleep(9)
            except BaseException: pass
        """,
        # It comes where nothing can be raised.
        """
        class Odd:
            def __del__(self):
                hit()
                time.sleep(0.1)
        Odd()
        time.sleep(9)
        """,
        # A thread fails because of it.
        """
        stop = threading.Event()
        def fail():
            stop.wait()
            raise RuntimeError
        thread = threading.Thread(target=fail)
        thread.start()
        try: hit(); time.sleep(9)
        finally: stop.set(); thread.join()
        """,
        # Something is put in order first.
        """
        with working():
            try: hit(); time.sleep(9)
            finally: time.sleep(0.1)
        """,
        # It is noted, and heard at the end.
        """
        with noted() as asked:
            hit()
            while asked() is None: pass
        time.sleep(9)
        """,
        # A second one does not wait.
        """
        with noted():
            hit()
            threading.Timer(0.2, hit).start()
            time.sleep(9)
        """,
        """
        try: hit(); time.sleep(9)
        finally:
            threading.Timer(0.2, hit).start()
            time.sleep(9)
        """,
        # A child of a fork is silent.
        """
        child = os.fork()
        if not child:
            hit(); time.sleep(9)
        os.waitpid(child, 0)
        hit(); time.sleep(9)
        """,
    ],
)
def test_a_signal_ends_a_command_with_its_code_and_one_line(number, body):
    began = time.monotonic()
    assert outcome(number, body) == (CODES[number], LINES[number])
    assert time.monotonic() - began < 8


@pytest.fixture
def fake(tmp_path):
    """Makes a module that hides NumPy, which every command imports. Its text is given."""

    def make(text: str) -> str:
        (tmp_path / "numpy.py").write_text(textwrap.dedent(text))
        return f"{tmp_path}:{ROOT}"

    return make


ARGUMENTS = {
    "train": [], "prepare": [], "evaluate": [str(ROOT)], "report": [str(ROOT)],
    "doctor": ["--config", "profuser/recipes/demo.yaml"], "store": ["info", "nowhere"],
    "generate": ["--prompt", "a"], "merge": ["--method", "linear", "--models", "a", "b", "--output", "nowhere"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "number"),
    [
        pytest.param(command, number, marks=pytest.mark.long if (c + n) % 2 else ())
        for c, command in enumerate(COMMANDS)
        for n, number in enumerate(CODES)
    ],
)
def test_an_import_that_swallows_everything_does_not_swallow_a_signal(fake, command, number):
    path = fake(f"""
        import os, time
        try: os.kill(os.getpid(), {number:d}); time.sleep(9)
        except BaseException: pass
    """)
    assert end(start("-m", f"profuser.{command}", *ARGUMENTS[command], path=path)) == (CODES[number], LINES[number])


@SIGNALS
def test_the_console_script_handles_signals_from_its_first_line_on(fake, number, tmp_path):
    (tmp_path / "profuser").write_text("import sys\nfrom profuser.cli import main\nsys.exit(main())\n")
    path = fake(f"import os, time; os.kill(os.getpid(), {number:d}); time.sleep(9)")
    # The script's own folder comes first on the path, as that of an installed script does.
    assert end(start(str(tmp_path / "profuser"), "store", "info", "nowhere", path=path)) == (
        CODES[number],
        LINES[number],
    )


@SIGNALS
def test_a_signal_while_the_interpreter_is_taken_down_changes_nothing(fake, number):
    path = fake(f"""
        import os, sys
        class Last:
            def __del__(self): os.kill(os.getpid(), {number:d})
        sys.last = Last()
        raise ImportError("no numpy")
    """)
    code, err = end(start("-m", "profuser.store", "info", "nowhere", path=path))
    assert code == 1
    assert "no numpy" in err  # a defect keeps its traceback
    assert "stopped" not in err
    assert "interrupted" not in err


def test_a_process_that_was_told_to_ignore_ctrl_c_ignores_it(fake):
    path = fake("""
        import os, signal, sys
        os.kill(os.getpid(), signal.SIGINT)
        sys.exit(9)
    """)
    assert end(start("-m", "profuser.store", "info", "nowhere", path=path, ctrl_c=signal.SIG_IGN)) == (9, "")


def test_a_program_that_only_imports_profuser_keeps_its_own_handlers():
    program = (
        "import signal\nbefore = [signal.getsignal(n) for n in (2, 15)]\nimport profuser, profuser.cli\n"
        "assert [signal.getsignal(n) for n in (2, 15)] == before"
    )
    assert end(start("-c", program)) == (0, "")


def test_a_command_in_a_process_gives_its_handlers_back():
    before = [signal.getsignal(number) for number in CODES]
    seen = []
    main_of(lambda argv: seen.extend(signal.getsignal(number) for number in CODES), [])
    assert all(handler not in before for handler in seen)
    assert [signal.getsignal(number) for number in CODES] == before


def test_outside_of_a_command_the_noted_signal_is_raised_at_the_end():
    with pytest.raises(Terminated), noted() as asked:  # noqa: PT012
        assert asked() is None
        os.kill(os.getpid(), signal.SIGTERM)
        while asked() is None:
            pass
    with working():  # without handlers nothing changes
        pass


# -- a whole run ---------------------------------------------------------------------------------------------------


SEED, SECONDS = 20261128, 15
"""The seed of the moments, and for how long after the beginning of the first line they are spread."""

MARK = '''
import os, sys

def mark(event, arguments):
    """Writes to stdout when the package's first module is about to run, which its first lines import."""
    if event == "exec" and getattr(arguments[0], "co_filename", "").endswith("profuser/stopping.py"):
        os.write(1, b"first line\\n")

sys.addaudithook(mark)
'''


def small_recipe(directory: Path, rows: int | None) -> list[str]:
    """The arguments of a small run, but for its directories. rows: how many of the rows of each data file are used."""
    small = small_run(directory).recipe.data
    for path in (small.train, small.validation, small.heldout):
        lines = Path(str(path)).read_text().splitlines(keepends=True)
        Path(str(path)).write_text("".join(lines[:rows]))
    (directory / "marked").mkdir()
    (directory / "marked/sitecustomize.py").write_text(MARK)
    return [
        f"--data.train={small.train}", f"--data.validation={small.validation}", f"--data.heldout={small.heldout}",
        "--generation.max_new_tokens=16", "--capture.shard_size=5",
        "--optim.steps=8", "--optim.batch_size=4", "--optim.micro_batch_size=4", "--optim.eval_every=4",
    ]  # fmt: skip


def places(place: Path) -> list[str]:
    """The arguments for the directories of a run."""
    return [f"--store={place / 'store'}", f"--output={place / 'run'}"]


def signalled(place: Path, recipe: list[str], number: int, delay: float, group: bool) -> bool:
    """Starts the run in a place and signals it after a delay. Returns whether it had ended before."""
    process = start("-m", "profuser.train", *recipe, *places(place), path=f"{place.parent / 'marked'}:{ROOT}")
    assert process.stdout is not None
    assert process.stdout.readline() == "first line\n"
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=delay)
    if process.poll() is None:
        (os.killpg if group else os.kill)(process.pid, number)
    code, err = end(process)
    assert "Traceback" not in err
    if code == 0:
        assert err == ""
        return True
    assert code == CODES[signal.Signals(number)], err
    assert err.count("\n") == 1, err
    assert err.startswith(("error: stopped by SIGTERM; ", "interrupted; "))
    return False


def results(place: Path) -> dict[str, bytes]:
    """The fused model and the shards of the store, which do not depend on time."""
    files = [place / "run/model.safetensors", *sorted((place / "store").rglob("*.safetensors"))]
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


@pytest.mark.parametrize(("count", "rows"), [(1, 3), pytest.param(40, None, marks=pytest.mark.long)])
def test_signals_at_seeded_moments_lose_nothing(tmp_path, count, rows):
    recipe = small_recipe(tmp_path, rows)
    whole, part = tmp_path / "whole", tmp_path / "part"
    with without_pictures(), without_plan():
        assert run("train", *recipe, *places(whole))[0] == 0
    expected = results(whole)
    moments = random.Random(SEED)
    for n in range(count):
        # The first moments are the first instants. A run that has ended is followed by a new one.
        delay = (0.0, 0.02, 0.5)[n] if n < 3 else moments.uniform(0, SECONDS)
        if signalled(part, recipe, moments.choice(list(CODES)), delay, group=n % 2 == 1):
            assert results(part) == expected
            shutil.rmtree(part)
    with without_pictures(), without_plan():
        assert run("train", *recipe, *places(part))[0] == 0
    assert results(part) == expected
