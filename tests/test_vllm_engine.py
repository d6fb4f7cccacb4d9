"""vLLM answers for sources, in a process of its own. A stub stands in for it here; test_vllm.py asks the real one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import run as run_command
from transformers import LlamaConfig

from profuser.errors import ConfigError, ProfuserError
from profuser.models.load import chat_format
from profuser.prepare import engines, vllm_worker
from profuser.prepare.engines import Asked, Source, answering, check_engine, longest_of
from profuser.prepare.vllm_engine import VllmProcess, own_environment
from profuser.recipe.generation import GenerationConfig
from profuser.recipe.schema import SourceConfig
from profuser.store import layout
from profuser.store.unfinished import Unfinished
from profuser.text.said import said


@pytest.fixture(scope="module")
def chat():
    return chat_format(SourceConfig(name="guardian", model="demo:guardian"))


STUB = '''
"""Stands in for vllm: a prompt is answered with its tokens in reverse, the last request first."""
import os, sys

assert not any(path.endswith("prepare") for path in sys.path), "profuser's modules would come before those of vllm"
__version__ = "stub"
print("vllm prints what it likes")
sys.stdout.flush()


class EngineArgs:
    def __init__(self, **arguments):
        self.arguments = arguments


class SamplingParams:
    def __init__(self, **sampling):
        self.sampling = sampling


class Output:
    def __init__(self, request_id, tokens, reason):
        self.request_id, self.finished = request_id, True
        self.outputs = [type("Completion", (), {"token_ids": tokens, "finish_reason": reason})()]


class LLMEngine:
    def __init__(self, arguments):
        if os.environ.get("STUB_FAILS") == "start":
            raise ValueError("1 validation error:\\n  the model is too large")
        self.arguments, self.waiting, self.steps = arguments, [], 0

    @classmethod
    def from_engine_args(cls, args):
        return cls(args.arguments)

    def add_request(self, request_id, prompt, sampling):
        self.waiting.append((request_id, prompt["prompt_token_ids"], sampling.sampling))

    def has_unfinished_requests(self):
        return bool(self.waiting)

    def step(self):
        self.steps += 1
        if self.steps > 2 and os.environ.get("STUB_FAILS") == "step":
            raise RuntimeError("CUDA error")
        if self.steps > 2 and os.environ.get("STUB_FAILS") == "crash":
            print("terminate called", file=sys.stderr, flush=True)
            os.abort()
        key, ids, sampling = self.waiting.pop()
        print("noise on the standard output")
        tokens = [i for i in ids[::-1] if i not in sampling["stop_token_ids"]][: sampling["max_tokens"]]
        if len(tokens) < sampling["max_tokens"]:
            return [Output(key, tokens + [sampling["stop_token_ids"][0]], "stop")]
        return [Output(key, tokens, "length")]
'''


@pytest.fixture
def stub(tmp_path):
    """A Python that has a vllm of ours and no profuser."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "vllm.py").write_text(STUB)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec env PYTHONPATH={tmp_path / "site"} {sys.executable} -S "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return str(program)


def of_stub(chat, python: str, **generation: Any) -> Source:
    config = SourceConfig(name="guardian", model="demo:guardian")
    said: dict[str, Any] = {"engine": "vllm", "python": python, "max_new_tokens": 40} | generation
    return Source(config, GenerationConfig(**said), chat, 256, 0, torch.float32)


def test_vllm_gets_the_tokens_of_prompts_and_its_tokens_are_what_is_said(chat, stub):
    prompts = [f"What is {n}?" for n in range(20)] + ["word " * 70]
    with answering("vllm", of_stub(chat, stub)) as answer:
        done = []
        found = answer(Asked("train", prompts), lambda n=1, *, tokens=0: done.append((n, tokens)))
        again = answer(Asked("heldout", prompts[:3]))
    assert [of[0].finished for of in found] == [True] * 20 + [False]
    for prompt, (response,) in zip(prompts, found):
        prompt_ids = chat.prompt_ids(prompt)
        ids = [i for i in prompt_ids[::-1] if i not in chat.end_ids][: min(40, 256 - len(prompt_ids))]
        assert response[::2] == said(chat, ids, strip_reasoning=False)
    assert again == found[:3]
    assert sum(n for n, _ in done) == 21
    assert sum(tokens for _, tokens in done) > 20


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        ("start", r"ValueError: 1 validation error: the model is too large"),
        ("step", r"RuntimeError: CUDA error"),
        ("crash", r"it ended with signal 6: .*"),
    ],
)
def test_what_goes_wrong_in_vllm_is_one_line_and_what_it_printed_is_kept(
    chat, stub, tmp_path, monkeypatch, fails, says
):
    monkeypatch.setenv("STUB_FAILS", fails)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    kind = layout.responses("train", "guardian")
    with pytest.raises(ProfuserError, match=says) as error, Unfinished(tmp_path, kind, 0, "vllm") as kept:  # noqa: SIM117
        with answering("vllm", of_stub(chat, stub)) as answer:
            answer(Asked("train", ["a?", "b?", "c?", "d?"], kept=kept))
    assert "\n" not in str(error.value)
    (log,) = tmp_path.glob("profuser-vllm-*.log")
    assert str(log) in str(error.value)
    # What it had answered is there, and only the rest is asked for.
    assert len(kept.results) == (0 if fails == "start" else 2)
    monkeypatch.delenv("STUB_FAILS")
    asked = []
    process = engines.VllmProcess.answers
    monkeypatch.setattr(
        engines.VllmProcess, "answers", lambda self, requests: (asked.extend(requests), process(self, requests))[1]
    )
    with Unfinished(tmp_path, kind, 0, "vllm") as kept, answering("vllm", of_stub(chat, stub)) as answer:
        assert len(answer(Asked("train", ["a?", "b?", "c?", "d?"], kept=kept))) == 4
    assert len(asked) == (4 if fails == "start" else 2)
    assert list(tmp_path.glob("profuser-vllm-*.log")) == [log]  # that of an engine that ended well is not kept


def test_sampled_requests_have_seeds_of_their_own(chat, stub, monkeypatch):
    sent = []
    process = engines.VllmProcess.answers
    monkeypatch.setattr(
        engines.VllmProcess, "answers", lambda self, requests: (sent.extend(requests), process(self, requests))[1]
    )
    with answering("vllm", of_stub(chat, stub, temperature=0.6, top_p=0.9)) as answer:
        answer(Asked("train", ["a?", "b?"], responses=3))
        answer(Asked("train", ["b?"], responses=3))
    sampling = [request["sampling"] for request in sent]
    assert {(s["temperature"], s["top_p"], s["max_tokens"]) for s in sampling} == {(0.6, 0.9, 40)}
    seeds = [s["seed"] for s in sampling]
    assert len({*seeds[:6]}) == 6
    assert seeds[6:] == seeds[3:6]
    assert all(s["stop_token_ids"] == list(chat.end_ids) for s in sampling)


def test_greedy_requests_have_no_seed(chat, stub, monkeypatch):
    sent = []
    monkeypatch.setattr(engines.VllmProcess, "answers", lambda self, requests: iter(sent.extend(requests) or ()))
    with answering("vllm", of_stub(chat, stub)) as answer:
        answer(Asked("train", ["a?"]))
    (request,) = sent
    assert request["sampling"].keys() == {"temperature", "top_p", "stop_token_ids", "detokenize", "max_tokens"}


@pytest.mark.parametrize(
    ("rope", "longest"), [({}, 64), ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}, 256)]
)
def test_vllm_reads_no_more_than_the_positions_of_a_model_unless_these_are_stretched(chat, tmp_path, rope, longest):
    LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_theta": 1e4, **rope}).save_pretrained(tmp_path)
    assert longest_of(of_stub(chat, sys.executable), str(tmp_path), {}) == longest


def test_the_worker_ends_with_its_parent(stub):
    """It is started by a process that is killed, and must not stay behind with a GPU in its hands."""
    worker = str(Path(vllm_worker.__file__))
    program = textwrap.dedent(f"""
        import subprocess, sys, time
        p = subprocess.Popen([{stub!r}, {worker!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        p.stdin.write('{{"engine": {{}}}}\\n'); p.stdin.flush()
        print(p.pid, p.stdout.readline(), flush=True)
        time.sleep(60)
    """)
    parent = subprocess.Popen([sys.executable, "-S", "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker_id = int(parent.stdout.readline().split()[0])
    parent.kill()
    parent.wait()
    for _ in range(200):
        if not Path(f"/proc/{worker_id}").exists() or "(zombie)" in Path(f"/proc/{worker_id}/status").read_text():
            return
        time.sleep(0.05)
    os.kill(worker_id, 9)
    raise AssertionError("the worker outlived its parent")


def test_the_worker_needs_the_standard_library_and_vllm_alone():
    program = "import sys; sys.path.insert(0, sys.argv[1]); import vllm_worker; print(sorted(sys.modules))"
    folder = str(Path(vllm_worker.__file__).parent)
    found = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, folder], capture_output=True, text=True, check=True, cwd="/"
    )
    assert "profuser" not in found.stdout
    assert "torch" not in found.stdout


def test_an_engine_in_another_python_has_its_own_packages_and_what_a_user_has_set(monkeypatch, tmp_path):
    environments = []

    def begun(*args, env, **options):
        environments.append(env)
        raise FileNotFoundError

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("subprocess.Popen", begun)
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    for python in (None, "/nowhere/python"):
        with pytest.raises(FileNotFoundError), VllmProcess(python, {}):
            pass
    assert [environment.get("PYTHONPATH") for environment in environments] == ["/ours", None]
    assert [environment["VLLM_CPU_KVCACHE_SPACE"] for environment in environments] == ["7", "7"]


def test_a_python_without_vllm_and_one_that_is_none_are_refused_at_the_start(chat, tmp_path):
    source = of_stub(chat, sys.executable)
    if not engines.has_vllm(sys.executable):
        with pytest.raises(ConfigError, match=r"generation\.engine vllm needs the package vllm, .* has none"):
            check_engine("vllm", source.config, source.generation)
    with pytest.raises(ConfigError, match=r"generation\.python must be a Python, got /nowhere/python"):
        engines.has_vllm("/nowhere/python")


def test_the_command_says_in_one_line_that_vllm_is_missing(in_run):
    code, _, err = run_command(
        "prepare", "--config", "recipe.yaml", "--store", "new", "--generation.engine=vllm", "--generation.python=/nowhere/python"
    )  # fmt: skip
    assert (code, err.count("\n")) == (2, 1)
    assert "generation.python must be a Python" in err
    assert not (in_run / "new" / "responses").exists()


def test_the_engine_of_one_of_several_processes_has_its_gpu_and_knows_of_no_launcher(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    launched = {"RANK": "5", "LOCAL_RANK": "1", "MASTER_ADDR": "x", "TORCHELASTIC_RUN_ID": "7", "HOME": "/root"}
    assert own_environment(launched) == {"HOME": "/root", "CUDA_VISIBLE_DEVICES": "1"}
    assert own_environment(launched | {"CUDA_VISIBLE_DEVICES": "4,6"})["CUDA_VISIBLE_DEVICES"] == "6"
    assert own_environment({"HOME": "/root"}) == {"HOME": "/root"}
