"""Shared fixtures: a small recipe over the bundled demo's models, and the rule for tests that need a GPU."""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton reads this when it is imported, which transformers does.
# With PROFUSER_EMULATED_GPU=90 they are compiled for sm_90 instead, and what comes out of that is run.
if not torch.cuda.is_available() and "PROFUSER_EMULATED_GPU" not in os.environ:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from profuser.recipe.parse import Run, parse_run
from profuser.recipe.places import resolve
from profuser.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parent.parent

if EMULATED := os.environ.get("PROFUSER_EMULATED_GPU"):
    import emulated_gpu

    emulated_gpu.install(int(EMULATED))
    os.environ["TRITON_INTERPRET"] = "1"  # from now on this only says that the kernels need no GPU

# A shell lets what it starts in the background ignore Ctrl-C. Tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# No power fails while tests run, and to wait for the disk takes more than a twentieth of their time.
os.fsync = lambda fd: None

# The garbage collector would go through all modules and tests again and again, while they are collected, which takes a quarter of
# that time, and then while tests run.
gc.set_threshold(50_000, 10, 10)
imported = 0


def leave_out_of_collections():
    """Lets the garbage collector leave out from now on what there is, which is mostly what has been imported and collected."""
    global imported
    imported = len(sys.modules)
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    leave_out_of_collections()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """What a test has imported is left out as well: every preparation and training collects, several times."""
    if len(sys.modules) > imported + 50:
        leave_out_of_collections()


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def small_data(directory: Path, name: str, rows_per_skill: int) -> str:
    """Writes the first rows of every skill from one of the demo's data files to a file of their own; returns its path."""
    rows = [json.loads(line) for line in Path(resolve(f"demo:{name}.jsonl")).read_text().splitlines()]
    seen: dict[str, int] = {}
    kept = []
    for row in rows:
        seen[row["skill"]] = seen.get(row["skill"], 0) + 1
        if seen[row["skill"]] <= rows_per_skill:
            kept.append(row)
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return str(path)


def small_run(directory: Path, *overrides: str) -> Run:
    """The demo's recipe with a few prompts and steps, and with its store and run under `directory`."""
    data = {name: small_data(directory, name, n) for name, n in (("fusion", 4), ("validation", 2), ("heldout", 2))}
    return parse_run(
        "train",
        [
            f"--data.train={data['fusion']}",
            f"--data.validation={data['validation']}",
            f"--data.heldout={data['heldout']}",
            f"--store={directory / 'store'}",
            f"--output={directory / 'run'}",
            "--generation.max_new_tokens=24",
            "--capture.shard_size=5",
            "--align.keep=all",
            "--optim.steps=4",
            "--optim.batch_size=4",
            "--optim.micro_batch_size=4",
            "--optim.eval_every=2",
            "--optim.log_every=1",
            *overrides,
        ],
        {},
        "",
    )


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """(directory, run, store) of the small recipe. The store is prepared once per session, so no test may change it."""
    from profuser.prepare.phases import prepare

    directory = tmp_path_factory.mktemp("small")
    run = small_run(directory)
    return directory, run, prepare(run)


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A folder with a recipe, its data, a model of its own and a finished run. Tests copy it with `command_runs.folder`."""
    from command_runs import make_good, without_pictures, without_plan

    place = tmp_path_factory.mktemp("good")
    with without_pictures(), without_plan():
        make_good(place)
    return place


@pytest.fixture(scope="session")
def mergeable(tmp_path_factory):
    """The directories of a base and of three models, a, b and c, that were trained from it. No test may change them."""
    from merge_models import make_models

    return make_models(tmp_path_factory.mktemp("mergeable"))


@pytest.fixture(params=[1 << 18, 10], ids=["one block", "several blocks"])
def in_blocks(request, monkeypatch):
    """A tensor that is merged is one block, or blocks of ten elements, by which nothing that is tested can be divided."""
    from profuser.merge import blocks

    monkeypatch.setattr(blocks, "BLOCK", request.param)


@pytest.fixture
def in_run(good, monkeypatch):
    """A copy of `good` as the working directory, from which functions can be imported as by `python -m`."""
    from command_runs import folder

    with folder(good) as here:
        monkeypatch.syspath_prepend(here)
        yield here


@pytest.fixture(autouse=True)
def lean_commands(request):
    """Tests of what commands do with the files of a finished run need neither pictures nor a plan."""
    if not {"good", "places"} & set(request.fixturenames):
        yield
        return
    from command_runs import without_pictures, without_plan

    with without_pictures(), without_plan():
        yield


@pytest.fixture(scope="session", autouse=True)
def lean_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") and not EMULATED:
            from lean_interpreter import make_lean

            make_lean(patch)
        yield


# The next fixtures run the Triton path of the fused loss, on a GPU if there is one and otherwise in Triton's interpreter.


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def triton_loss(device):
    """`loss_checks.run` for the Triton path."""
    from loss_checks import run

    from profuser.loss import fused_linear_fusion_loss

    return partial(run, fused_linear_fusion_loss, device=device, impl="triton")


@pytest.fixture
def triton_check(device):
    from loss_checks import assert_as_accurate_as_reference

    return partial(assert_as_accurate_as_reference, device=device, impl="triton")


@pytest.fixture
def small_blocks(monkeypatch):
    """Makes blocks so small that the vocabulary of the small cases, 83, is one whole block of columns and a masked one."""
    from profuser.kernels import fused_loss_triton

    monkeypatch.setattr(fused_loss_triton, "dense_config", lambda *args: (64, 1))


@pytest.fixture
def poisoned_buffers(monkeypatch):
    """Fills every new buffer with NaN, so that what no kernel writes shows in the results."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(math.nan if buffer.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def numpy_xor(monkeypatch, request):
    """Lets the interpreter reduce with xor in NumPy, as tl.topk needs it.

    An operator that it does not know it would apply in Python, to one element at a time.
    """
    if torch.cuda.is_available() or "plain_interpreter" in request.node.name:
        return
    import triton
    from triton.runtime.interpreter import ReduceOps

    known = ReduceOps.apply_impl

    def apply_impl(self, input):
        if self.combine_fn != triton.language.standard._xor_combine:
            return known(self, input)
        data = np.bitwise_xor.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(data, input[0].dtype)

    monkeypatch.setattr(ReduceOps, "apply_impl", apply_impl)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fills what new_empty gives with NaN or an impossible id, so that an output which is never written shows."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *args, **kwargs):
        out = empty(self, *args, **kwargs)
        return out.fill_(math.nan if out.dtype.is_floating_point else -7)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)


__all__ = ["ROOT", "Recipe", "small_data", "small_run"]


@pytest.fixture(scope="session")
def paper():
    """The plan of the paper's recipe, without its models and data."""
    from plan_models import PAPER

    from profuser.plan.plan import make_plan

    return make_plan(parse_run("train", ["--config", PAPER]), timed=False)
