"""Every failure of a command is one line with its documented exit code, but a defect of our own keeps its traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors import SafetensorError

from profuser.cli import COMMANDS, explained, main, main_of
from profuser.errors import ConfigError, DataError, NonFiniteError, OutOfMemoryError, ProfuserError, Terminated


def ends(error: BaseException) -> int | str | None:
    """The exit code with which main_of ends a command that raises this error."""

    def command(argv):
        raise error

    with pytest.raises(SystemExit) as stop:
        main_of(command, [])
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ProfuserError("x"), 1),
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (NonFiniteError("x"), 4),
        (OutOfMemoryError("x"), 5),
        (Terminated("x"), 75),
        (KeyboardInterrupt(), 130),
        (torch.OutOfMemoryError("CUDA out of memory\nmore"), 5),
        (torch.AcceleratorError("CUDA error: out of memory"), 5),
        (RuntimeError("Triton Error [CUDA]: out of memory"), 5),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 5),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1),
        (SafetensorError("I/O error"), 1),
        (ModuleNotFoundError("No module named 'datasets'", name="datasets"), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_failure_has_its_exit_code_and_one_line(error, code, capsys):
    assert ends(error) == code
    err = capsys.readouterr().err.strip()
    assert err
    assert "\n" not in err


def test_a_process_whose_neighbour_has_ended_says_so_in_one_line():
    lost = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [::1]:1")
    for error in (lost, torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1.")):
        assert "one has ended; its own line says why" in str(explained(error))
    with pytest.raises(RuntimeError, match="shapes"):  # a defect of our own stays as it is
        explained(RuntimeError("shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("module", "extra"), [("datasets", "train"), ("gguf", "gguf"), ("reasoning_gym.utils", "recipes")]
)
def test_a_package_that_is_missing_is_named_with_its_extra(module, extra):
    message = str(explained(ModuleNotFoundError(name=module)))
    assert f"the package {module.partition('.')[0]}" in message
    assert f"pip install 'profuser[{extra}]'" in message


@pytest.mark.parametrize("error", [ValueError("a defect"), ModuleNotFoundError(name="profuser.nowhere")])
def test_a_defect_of_our_own_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        main_of(lambda argv: (_ for _ in ()).throw(error), [])


def test_a_command_gets_the_arguments_of_the_command_line(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["profuser.x", "--a", "1"])
    main_of(seen.extend)
    assert seen == ["--a", "1"]


def test_a_reader_who_has_seen_enough_is_no_failure():
    """`profuser train --help | head -1` closes the pipe, and no traceback is printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "profuser.train", "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.wait(timeout=60)


def test_the_console_script_lists_the_commands(monkeypatch, capsys):
    for arguments in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["profuser", *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 0
        assert all(command in capsys.readouterr().out for command in [*COMMANDS][:1])


def test_the_console_script_runs_a_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["profuser", "report", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 3
    assert "RUN_DIR must be an existing directory" in capsys.readouterr().err


def test_a_misspelt_command_is_named_with_the_nearest_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profuser", "trian"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_the_version_is_the_packages(monkeypatch, capsys):
    import profuser

    monkeypatch.setattr(sys, "argv", ["profuser", "--version"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.strip() == profuser.__version__


def test_a_signal_that_comes_before_the_heavy_imports_ends_as_documented():
    """Here SIGTERM comes while the command line is still being read."""
    program = (
        "import os, signal; from profuser.cli import main_of; main_of(lambda a: os.kill(os.getpid(), signal.SIGTERM))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (75, 1)
    assert os.name == "posix"


def test_the_console_script_finds_functions_where_it_runs(tmp_path):
    """`python -m` puts the working directory on the path, and a console script alone would not."""
    (tmp_path / "mine.py").write_text("def score(example, responses):\n    return [1.0] * len(responses)\n")
    program = (
        "import sys; sys.path = [p for p in sys.path if p]; sys.argv[1:] = ['store', 'info', 'nowhere']\n"
        "from profuser.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "from profuser.recipe.places import load_function\n"
        "assert load_function('mine:score', 'judges')({}, ['a']) == [1.0]"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            ("train", "--data.train", "nowhere.jsonl"),
            "must be an existing file or folder, or a Hub data set, got nowhere.jsonl",
        ),
        (("prepare", "--data.heldout", "nowhere/*.csv"), "got nowhere/*.csv (no file fits the pattern)"),
        (("train", "--target", "./nowhere"), "must be an existing directory or GGUF file, got ./nowhere"),
        (("generate", "--input", "nowhere.jsonl", "--output", "o.jsonl"), "--input must be an existing JSONL file"),
        (("merge", "--method", "linear", "--models", "./a", "./b", "--output", "m"), "GGUF file, got ./a"),
    ],
)
def test_what_is_not_there_is_refused_before_torch_is_imported(tmp_path, command, line):
    program = f"""
import sys
from profuser.cli import main
sys.argv = ["profuser", *{command!r}]
try:
    main()
except SystemExit as stop:
    assert stop.code == 3, stop.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert line in done.stderr
    assert not list(tmp_path.iterdir())
