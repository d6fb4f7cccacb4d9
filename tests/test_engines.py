"""Servers answer for sources: the same store as with transformers, nothing asked twice, and clear words where they fail."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_server import chat_server, choice
from conftest import small_run

from profuser.errors import ConfigError, ProfuserError
from profuser.models.load import chat_format
from profuser.prepare import engines, server
from profuser.prepare.engines import Asked, Source, answering, check_engine, settled_engine
from profuser.prepare.inputs import Inputs
from profuser.prepare.phases import prepare
from profuser.prepare.responses import Response, read_responses
from profuser.prepare.server import Server
from profuser.recipe.generation import GenerationConfig
from profuser.recipe.places import resolve
from profuser.recipe.schema import SourceConfig
from profuser.recipe.server import ServerConfig
from profuser.store import layout
from profuser.store.unfinished import Unfinished
from profuser.text.conversation import Conversation
from profuser.text.fit import Verdict
from profuser.text.said import Said, said_elsewhere


@pytest.fixture(scope="module")
def chat():
    return chat_format(SourceConfig(name="guardian", model="demo:guardian"))


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(server, "FIRST_WAIT", 0.001)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def of_server(chat, url: str, *, max_length: int = 256, generation: dict | None = None, **options: Any) -> Source:
    config = SourceConfig(name="guardian", model="demo:guardian", server=ServerConfig(url=url, **options))
    said: dict[str, Any] = {"engine": "server", "max_new_tokens": 20} | (generation or {})
    return Source(config, GenerationConfig(**said), chat, max_length, 0, torch.float32)


def answers(source: Source, prompts: list, **options: Any) -> list[list[Response]]:
    with answering("server", source) as answer:
        return answer(Asked("train", prompts, **options))


def one(text: str, finished: bool = True, verdict: Verdict = Verdict.OK) -> list[Response]:
    return [Response(text, finished, verdict)]


# --- servers ----------------------------------------------------------------------------------------------------------


def test_a_server_is_asked_for_what_the_recipe_says(chat, monkeypatch):
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    prompts = ["One?", Conversation.of([*talk, {"role": "user", "content": "Why?"}]), "word " * 300]
    monkeypatch.setenv("THE_KEY", "s3cret")
    with chat_server(lambda body: choice(f" {body['messages'][-1]['content']}! \n")) as there:
        source = of_server(chat, there.url, key_variable="THE_KEY", generation={"temperature": 0.5, "top_p": 0.9})
        # The last prompt leaves no room for a response, and is not asked for.
        assert answers(source, prompts, responses=2) == [
            one("One?!") * 2,
            one("Why?!") * 2,
            one("") * 2,
        ]
    assert len(there.bodies) == 4
    assert {body["model"] for body in there.bodies} == {"served"}  # the only one that the server lists
    assert {(body["temperature"], body["top_p"]) for body in there.bodies} == {(0.5, 0.9)}
    assert len({body["seed"] for body in there.bodies}) == 4
    assert set(there.keys) == {"Bearer s3cret"}
    first, second = ([b for b in there.bodies if b["messages"][-1]["content"] == text] for text in ("One?", "Why?"))
    assert first[0]["messages"] == [{"role": "user", "content": "One?"}]
    assert first[0]["max_tokens"] == 20
    assert [m["role"] for m in second[0]["messages"]] == ["system", "user", "assistant", "user"]


def test_a_prompt_is_done_when_all_its_responses_are_there(chat):
    done = []
    with chat_server(lambda body: choice("yes")) as there, answering("server", of_server(chat, there.url)) as answer:
        answer(Asked("train", ["One?", "word " * 300, "Two?"], 3), lambda n=1, *, tokens=0: done.append((n, tokens)))
    assert sum(n for n, _ in done) == 3
    assert sum(tokens for _, tokens in done) == 6 * 3


def test_a_system_message_goes_where_the_models_template_has_a_place_for_it():
    chat = chat_format(SourceConfig(name="scholar", model="demo:scholar"))
    assert not chat.template.has_system
    talk = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    with chat_server(lambda body: choice("yes")) as there:
        answers(of_server(chat, there.url), [Conversation.of(talk)])
    assert there.bodies[0]["messages"] == [{"role": "user", "content": "Be kind.\n\nHi"}]


def test_greedy_requests_have_no_seed_and_a_response_has_the_room_that_is_left(chat):
    with chat_server(lambda body: choice("yes"), models=["a", "b"]) as there:
        length = len(chat.prompt_ids("One?"))
        source = of_server(chat, there.url, model="b", max_length=length + 3)
        assert answers(source, ["One?"]) == [one("yes")]
    (body,) = there.bodies
    assert body == {
        "model": "b",
        "messages": [{"role": "user", "content": "One?"}],
        "max_tokens": 3,
        "temperature": 0.0,
    }


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (choice("cut off", "length"), one("cut off", False)),
        (choice(None), one("")),
        (choice("", "content_filter"), one("", False)),
        (choice(None, "tool_calls"), one("", False)),
        (choice("half a \ufffd"), one("half a \ufffd", True, Verdict.BROKEN)),
        (choice("half a \ud83d", "length"), one("half a \ufffd", False, Verdict.BROKEN)),
    ],
)
def test_what_a_server_says_is_recorded_as_what_it_is(chat, reply, expected):
    with chat_server(lambda body: reply) as there:
        assert answers(of_server(chat, there.url), ["One?"]) == [expected]


def test_a_control_token_in_a_servers_text_is_not_used(chat):
    token = chat.token_bytes.specials[chat.end_id]
    assert said_elsewhere(chat, f"yes{token}", strip_reasoning=False) == Said(f"yes{token}", Verdict.CONTROL)


@pytest.mark.parametrize(
    ("text", "strip", "expected"),
    [
        ("<think>\nhm</think>\n\n4", True, Said("4", Verdict.OK)),
        ("<think>\nhm</think>\n\n4", False, Said("<think>\nhm</think>\n\n4", Verdict.OK)),
        ("<think>\nhm", True, Said("", Verdict.REASONING)),
        (" 4 ", True, Said("4", Verdict.OK)),
    ],
)
def test_reasoning_in_a_servers_text_follows_the_rule(chat, text, strip, expected):
    assert said_elsewhere(chat, text, strip_reasoning=strip) == expected


def test_reasoning_that_a_server_gives_apart_is_said(chat, capsys):
    with chat_server(lambda body: choice("4", reasoning_content="2 + 2")) as there:
        assert answers(of_server(chat, there.url), ["One?", "Two?"]) == [one("4"), one("4")]
        assert "the reasoning of 2 responses apart" in capsys.readouterr().out
        answers(of_server(chat, there.url, generation={"reasoning": "strip"}), ["One?"])
        assert "apart" not in capsys.readouterr().out


def test_reasoning_may_be_given_apart_under_either_of_its_names(chat, capsys):
    with chat_server(lambda body: choice("4", reasoning="2 + 2")) as there:
        assert answers(of_server(chat, there.url), ["One?", "Two?"]) == [one("4"), one("4")]
    assert "the reasoning of 2 responses apart" in capsys.readouterr().out


def test_spaces_around_a_key_are_not_a_part_of_it(chat, monkeypatch):
    monkeypatch.setenv("THE_KEY", " s3cret\n")
    with chat_server(lambda body: choice("yes")) as there:
        answers(of_server(chat, there.url, key_variable="THE_KEY"), ["One?"])
    assert there.keys == ["Bearer s3cret"]


def test_requests_are_sent_side_by_side(chat):
    together = threading.Barrier(4, timeout=20)

    def answer(body):
        together.wait()
        return choice("yes")

    with chat_server(answer) as there:
        assert answers(of_server(chat, there.url, concurrency=4), [f"{n}?" for n in range(8)]) == [one("yes")] * 8
        assert there.most == 4


def test_nothing_more_is_asked_when_nobody_waits_for_the_answers():
    others, gate, begun = set(threading.enumerate()), threading.Event(), []

    def ask(job):
        begun.append(job)
        assert job == 0 or gate.wait(20)

    config = ServerConfig(url="http://127.0.0.1:9/v1", concurrency=1)
    found = Server(config, "sources: a: server").all(range(9), ask)
    assert next(found) == (0, None)
    workers = set(threading.enumerate()) - others
    found.close()
    gate.set()
    for worker in workers:
        worker.join()
    assert begun in ([0], [0, 1])


@pytest.mark.parametrize("status", [429, 500, 502, 503, 529, 408])
def test_a_server_that_is_busy_is_asked_again(chat, status):
    def answer(body):
        return choice("yes") if len(there.bodies) % 3 == 0 else (status, "busy")

    with chat_server(answer) as there:
        assert answers(of_server(chat, there.url, concurrency=1), ["One?", "Two?"]) == [one("yes")] * 2
        assert len(there.bodies) == 6


def test_a_server_may_say_how_long_to_wait(chat):
    def answer(body):
        return choice("yes") if len(there.bodies) > 1 else (503, "loading")

    with chat_server(answer, headers={"Retry-After": "0.4"}) as there:
        begin = time.monotonic()
        answers(of_server(chat, there.url), ["One?"])
        assert time.monotonic() - begin >= 0.4


def test_a_server_cannot_ask_for_any_wait(chat, monkeypatch):
    monkeypatch.setattr(server, "LONGEST_ASKED", 0.1)
    with chat_server(lambda body: (503, "loading"), headers={"Retry-After": "4"}) as there:
        begin = time.monotonic()
        with pytest.raises(ProfuserError, match="in 2 tries"):
            answers(of_server(chat, there.url, model="served", retries=1), ["One?"])
        assert time.monotonic() - begin < 3


@pytest.mark.parametrize(
    ("reply", "kind", "says"),
    [
        ((401, {"error": {"message": "Bad key s3cret"}}), ConfigError, r"refuses a request: 401 Bad key \*\*\*; give its key"),
        ((400, {"error": "max_tokens\n is too large"}), ConfigError, "400 max_tokens is too large; change what it complains about"),
        ((404, "no such model"), ConfigError, "404 no such model; correct its url or model"),
        ((429, {"error": {"code": "insufficient_quota"}}), ConfigError, "insufficient_quota.*raise the quota"),
        ((500, "out of memory"), ProfuserError, r"it did not in 3 tries \(500 out of memory\); start it"),
        ((302, ""), ProfuserError, "must not redirect"),
        ((200, "<html>"), ProfuserError, "must reply with JSON, got '<html>'"),
        ((200, "[" * 100_000), ProfuserError, r"must reply with JSON, got '\[\["),
        ((400, "[" * 100_000), ConfigError, r"refuses a request: 400 \[\["),
        ((200, {"choices": []}), ProfuserError, "must reply with choices"),
        ((200, []), ProfuserError, "must reply with choices"),
        (choice(7), ProfuserError, "must reply with choices"),  # pyrefly: ignore[bad-argument-type]
    ],
)  # fmt: skip
def test_what_a_server_refuses_is_one_line(chat, monkeypatch, reply, kind, says):
    monkeypatch.setenv("THE_KEY", "s3cret")
    with chat_server(lambda body: reply) as there:
        source = of_server(chat, there.url, model="served", key_variable="THE_KEY", retries=2, concurrency=1)
        with pytest.raises(kind, match=says) as error:
            answers(source, ["One?", "Two?"])
    assert "\n" not in str(error.value)
    assert "s3cret" not in str(error.value)
    assert str(error.value).startswith("sources: guardian: server: the server http://127.0.0.1:")


def test_neither_a_prompt_nor_the_key_follows_a_redirect(chat, monkeypatch):
    monkeypatch.setenv("THE_KEY", "s3cret")
    with chat_server(lambda body: choice("yes")) as other:
        place = f"{other.url}/chat/completions"
        with chat_server(lambda body: (307, ""), headers={"Location": place}) as there:
            source = of_server(chat, there.url, model="served", key_variable="THE_KEY")
            with pytest.raises(ProfuserError, match=f"must not redirect requests, it names {place}; name that url"):
                answers(source, ["One?"])
    assert not other.bodies


def test_a_server_that_is_not_there_is_one_line(chat):
    source = of_server(chat, "http://127.0.0.1:9/v1", retries=1)
    with pytest.raises(ProfuserError, match=r"must reply, it did not in 2 tries \(.*refused.*\); start it") as error:
        answers(source, ["One?"])
    assert "object at 0x" not in str(error.value)
    assert error.value.exit_code == 1


def test_a_reply_that_takes_too_long_is_asked_for_again(chat):
    def answer(body):
        time.sleep(0 if len(there.bodies) > 1 else 0.6)
        return choice("yes")

    with chat_server(answer) as there:
        assert answers(of_server(chat, there.url, timeout=0.2), ["One?"]) == [one("yes")]
        there.bodies.clear()
        with pytest.raises(ProfuserError, match="no reply in time"):
            answers(of_server(chat, there.url, timeout=0.2, retries=0, model="served"), ["One?"])


def test_a_key_of_a_netrc_file_is_not_sent(chat, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with chat_server(lambda body: choice("yes")) as there:
        answers(of_server(chat, there.url), ["One?"])
    assert there.keys == [None]


@pytest.mark.parametrize(
    ("options", "environment", "says"),
    [
        ({"model": "other"}, {}, r"server.model must be one of those of http.*'a', 'b'.*, got other"),
        ({}, {}, "server.model must name the model where http.* has not exactly one, it lists a, b"),
        ({"key_variable": "THE_KEY"}, {}, "environment variable that holds the key, THE_KEY is not set; export it"),
        (
            {"key_variable": "THE_KEY"},
            {"THE_KEY": "a\nb"},
            "environment variable that holds the key, THE_KEY holds none",
        ),
    ],
)
def test_what_is_wrong_with_a_server_is_known_before_any_model_runs(chat, monkeypatch, options, environment, says):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with chat_server(lambda body: choice("yes"), models=["a", "b"]) as there:
        source = of_server(chat, there.url, **options)
        with pytest.raises(ConfigError, match=says):
            check_engine("server", source.config, source.generation)
    assert not there.bodies


@pytest.mark.parametrize(
    "url",
    [
        "localhost:8000/v1",
        "ftp://host/v1",
        "http://",
        "http://host:port/v1",
        "http://host/v1?key=1",
        "http://me:pw@host/v1",
        "",
    ],
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match=r"server\.url must") as error:
        SourceConfig(name="a", model="demo:guardian", server=url)
    assert "sources: a: server.url" in str(error.value)


def test_a_key_in_place_of_its_variable_is_not_printed():
    with pytest.raises(ConfigError, match="key_variable must be the name") as error:
        SourceConfig(name="a", model="m", server=ServerConfig(url="http://host/v1", key_variable="sk-abc"))
    assert "sk-abc" not in str(error.value)


def test_servers_are_asked_again_only_for_a_while():
    with pytest.raises(ProfuserError, match="1 try"):
        Server(ServerConfig(url="http://127.0.0.1:9/v1", retries=0, model="x"), "sources: a: server").chat([])


# --- a whole preparation by servers -----------------------------------------------------------------------------------


def served_run(expected, run, url: str, store: Path, **options: Any):
    """The small recipe with a server for the first two sources, and a map from their names and prompts to their responses."""
    rows, texts = Inputs.open(run).rows, {}
    for split in ("train", "heldout"):
        for source in run.recipe.sources[:2]:
            kind = layout.responses(split, source.name)
            found = expected.by_example(kind, partial(read_responses, expected, split, source.name))
            texts |= {(source.name, row["prompt"]): of[0] for row, of in zip(rows[split], found, strict=True)}
    sources = [
        replace(source, server=ServerConfig(url=url, model=source.name, retries=0, **options)) if n < 2 else source
        for n, source in enumerate(run.recipe.sources)
    ]
    return replace(run, recipe=replace(run.recipe, sources=sources, store=str(store))), texts


def test_a_store_of_servers_is_that_of_transformers_and_nothing_is_asked_twice(prepared, tmp_path, capsys):
    _, run, expected = prepared
    names = [source.name for source in run.recipe.sources]
    last: list[int] = []

    def answer(body):
        place = body["model"], body["messages"][-1]["content"]
        if last and len(there.bodies) > last[0]:
            return 503, "gone"
        response = texts[place]
        return choice(response.text, "stop" if response.finished else "length")

    with chat_server(answer, models=names) as there:
        served, texts = served_run(expected, run, there.url, tmp_path / "store", concurrency=2)
        # It fails now and then, and the same command goes on from there.
        for stop in (5, 9):
            last[:] = [len(there.bodies) + stop]
            with pytest.raises(ProfuserError, match="what was answered is kept"):
                prepare(served)
        answered = [json.dumps([b["model"], b["messages"]]) for b in there.bodies]
        last.clear()
        store = prepare(served)
        asked = len(texts)
        assert len(there.bodies) <= asked + 2 * 3  # what failed, and what was on its way then
        assert len({*answered}) > 9
        capsys.readouterr()
        # Where the server is does not decide what it says.
        moved, _ = served_run(expected, run, "http://127.0.0.1:9/v1", tmp_path / "store")
        assert prepare(moved).digests == store.digests
    for kind in (layout.targets("train"), layout.targets("heldout"), *map(layout.winners, names)):
        assert store.digest(kind) == expected.digest(kind), kind
    assert not (store.directory / "unfinished").exists()
    # A store whose responses came from another engine is another store.
    with pytest.raises(ConfigError, match=r"sources\.guardian\.engine"):
        prepare(replace(run, recipe=replace(run.recipe, store=str(tmp_path / "store"))))


def test_a_damaged_line_is_asked_for_again(chat, tmp_path):
    kind = layout.responses("train", "guardian")
    with chat_server(lambda body: choice(body["messages"][-1]["content"])) as there:
        prompts = ["a?", "b?", "c?"]
        source = of_server(chat, there.url, concurrency=1)

        def ask() -> list[list[Response]]:
            with pytest.raises(KeyboardInterrupt), Unfinished(tmp_path, kind, 0, "server") as kept:  # noqa: PT012
                found = answers(source, prompts, kept=kept)
                raise KeyboardInterrupt
            return found

        expected = [one(text) for text in prompts]
        assert ask() == expected
        path = tmp_path / "unfinished" / "responses-train-guardian-00000.jsonl"
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        assert len(lines) == len(there.bodies) == 3
        for damaged, again in (
            (whole, 0),
            (lines[0] + lines[1][:-5], 2),
            (whole.replace(b"b?", b"x?"), 1),
            (b"\xff\n" + lines[2], 2),
            (b"", 3),
        ):
            path.write_bytes(damaged)
            there.bodies.clear()
            assert ask() == expected
            assert len(there.bodies) == again
            assert ask() == expected
            assert len(there.bodies) == again  # a line behind a damaged one is whole
        # A result that is whole, but no response as they are here, is asked for again as well.
        with pytest.raises(KeyboardInterrupt), Unfinished(tmp_path, kind, 0, "server") as kept:  # noqa: PT012
            kept.add((1, 0), ["b?", True, 99])
            raise KeyboardInterrupt
        there.bodies.clear()
        assert ask() == expected
        assert len(there.bodies) == 1
        # What another engine answered counts for nothing.
        with Unfinished(tmp_path, kind, 0, "vllm") as kept:
            assert not kept.results
        assert not path.exists()


# --- which engine -----------------------------------------------------------------------------------------------------


def test_auto_is_vllm_on_a_gpu_where_it_is_installed(prepared, monkeypatch, tmp_path):
    _, run, store = prepared
    source = run.recipe.sources[0]

    def settled(device: str, there: bool, place: Path = tmp_path) -> str:
        monkeypatch.setattr(engines, "has_vllm", lambda python: there)
        return settled_engine(run.recipe, source, place, torch.device(device))

    assert run.recipe.generation.engine == "auto"
    assert settled("cuda", True) == "vllm"
    assert settled("cuda", False) == settled("cpu", True) == "transformers"
    assert settled("cuda", True, store.directory) == "transformers"  # with which the store was begun


def test_auto_is_transformers_for_what_vllm_does_not_read(prepared, monkeypatch, tmp_path):
    recipe = prepared[1].recipe
    monkeypatch.setattr(engines, "has_vllm", lambda python: True)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": resolve("demo:guardian")}))
    adapter, gguf = (SourceConfig(name=name, model=str(tmp_path)) for name in ("adapter", "gguf"))
    assert settled_engine(recipe, adapter, tmp_path, torch.device("cuda")) == "transformers"
    monkeypatch.setattr(engines, "adapter_folder", lambda source: None)
    monkeypatch.setattr(engines, "weights_of", lambda source: (source.model, {"gguf_file": "model.gguf"}))
    assert settled_engine(recipe, gguf, tmp_path, torch.device("cuda")) == "transformers"


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("", ["--generation.engine=server"], "sources: a must have a server with generation.engine server"),
        ("", ["--generation.python=p", "--generation.engine=transformers"], "generation.python must go with"),
        ("generation: {engine: server}", [], "sources: a must have a server"),
        ("server: 'http://h/v1', generation: {engine: vllm}", [], "must be server where"),
        ("generation: {top_p: 2}", [], "generation.top_p must be <= 1"),
        ("generation: {temperature: -1}", [], "generation.temperature must be >= 0"),
        ("generation: {batch_size: 0}", [], "generation.batch_size must be > 0"),
        ("generation: {temperature: 0}", ["--generation.temperature=1", "--generation.responses_per_source=2"],
         "got 2 at 0 of source a; set"),
        ("server: {url: 'http://h/v1', concurrency: 0}", [], "server.concurrency must be > 0"),
        ("server: {url: 'http://h/v1', retries: -1}", [], "server.retries must be >= 0"),
        ("server: {model: x}", [], "must have the key url"),
        ("server: {url: 'http://h/v1', key: x}", [], "key"),
    ],
)  # fmt: skip
def test_a_recipe_whose_sources_cannot_answer_is_refused(tmp_path, source, options, says):
    spelt = f"--sources=[{{name: a, model: 'demo:guardian', {source}}}]"
    with pytest.raises(ConfigError, match=says):
        small_run(tmp_path, spelt, "--target=a", *options)


def test_a_source_that_samples_by_itself_may_give_several_responses(tmp_path):
    spelt = "[{name: a, model: 'demo:guardian', generation: {temperature: 1}}]"
    small_run(tmp_path, f"--sources={spelt}", "--target=a", "--generation.responses_per_source=2")


def test_what_a_source_does_otherwise_is_a_part_of_its_settings(tmp_path):
    spelt = "[{name: a, model: 'demo:guardian'}, {name: b, model: 'demo:scholar', generation: {temperature: 0.7, max_new_tokens: 9}}]"
    recipe = small_run(tmp_path, f"--sources={spelt}", "--target=a").recipe
    assert [recipe.generation_of(s).temperature for s in recipe.sources] == [0.0, 0.7]
    assert [recipe.generation_of(s).max_new_tokens for s in recipe.sources] == [24, 9]
    inputs = Inputs.open(small_run(tmp_path, f"--sources={spelt}", "--target=a"))
    settings = inputs.settings().sources
    assert "generation" not in settings["sources"]["a"]
    assert settings["sources"]["b"]["generation"] == {"temperature": 0.7, "max_new_tokens": 9, "seed": 0}
    assert settings["generation"]["max_new_tokens"] == 24
    assert not {"engine", "python"} & set(settings["generation"])


def test_each_source_samples_by_its_own_rule(tmp_path, monkeypatch):
    spelt = "[{name: a, model: 'demo:guardian'}, {name: b, model: 'demo:scholar', generation: {temperature: 0.7, batch_size: 3}}]"
    seen = {}
    generate = engines.generate

    def noted(model, chat, prompts, config, **options):
        seen[options["of"]] = (config.temperature, config.batch_size)
        return generate(model, chat, prompts, config, **options)

    monkeypatch.setattr(engines, "generate", noted)
    run = small_run(tmp_path, f"--sources={spelt}", "--target=a", "--generation.batch_size=5", "--generation.max_new_tokens=2",
                    "--judges=[]", "--schedule=fusellm")  # fmt: skip
    prepare(run)
    assert seen == {"a heldout": (0.0, 5), "b heldout": (0.7, 3)}
