"""Conversations in the data: the store does not depend on how they are written down, and every turn before the response is seen."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import small_run

from profuser.errors import DataError
from profuser.prepare.data import for_functions
from profuser.prepare.inputs import Inputs
from profuser.prepare.judges import check_conversations
from profuser.prepare.phases import prepare
from profuser.recipe.places import resolve
from profuser.recipe.schema import JudgeConfig
from profuser.text.conversation import Conversation, Turn
from profuser.text.template import conversation
from profuser.train.targets import Targets


def shards(store) -> dict[str, bytes]:
    return {
        str(path.relative_to(store.directory)): path.read_bytes()
        for path in sorted(Path(store.directory).rglob("*.safetensors"))
    }


def rewritten(path, row) -> None:
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    Path(path).write_text("".join(json.dumps(row(old)) + "\n" for old in rows))


@pytest.mark.long
def test_a_store_of_conversations_is_that_of_prompts_and_responses(prepared, tmp_path):
    _, _, expected = prepared
    run = small_run(tmp_path)
    forms = {
        run.recipe.data.train: lambda q, a: {
            "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
        },
        run.recipe.data.validation: lambda q, a: {"instruction": q, "output": a},
        run.recipe.data.heldout: lambda q, a: {"messages": conversation(q, a)},
    }
    for path, form in forms.items():
        rewritten(path, lambda old, form=form: form(old.pop("prompt"), old.pop("response")) | old)
    store = prepare(run)
    assert store.settings.sources["data"] == expected.settings.sources["data"]
    assert shards(store) == shards(expected)


@pytest.fixture(scope="module")
def of_turns(tmp_path_factory):
    """A store of conversations: a system message, an earlier question with its answer, and the demo's prompt."""
    run = small_run(tmp_path_factory.mktemp("turns"), "--data.turns=all")
    for path in (run.recipe.data.train, run.recipe.data.heldout):
        rewritten(
            path,
            lambda old: {
                "skill": old["skill"],
                "messages": [
                    {"role": "system", "content": "Be brief."},
                    {"role": "user", "content": "What is 8-4?"},
                    {"role": "assistant", "content": "Answer: 4."},
                    {"role": "user", "content": old["prompt"]},
                    {"role": "assistant", "content": old["response"]},
                ],
            },
        )
    return run, prepare(run)


def test_every_turn_of_the_assistant_is_learnt_behind_those_before_it(of_turns):
    run, store = of_turns
    inputs = Inputs.open(run)
    targets = Targets(store, "train")
    rows = inputs.rows["train"]
    assert len(rows) == 24
    system, question = Turn("system", "Be brief."), Turn("user", "What is 8-4?")
    for example, row in enumerate(rows):
        if example % 2:
            earlier = (system, question, Turn("assistant", "Answer: 4."))
            assert row["prompt"].turns[:-1] == earlier
        else:
            assert row["prompt"] == Conversation((system, question))
        encoded = inputs.target.encode(row["prompt"], row["response"])
        learnt = {tuple(s.input_ids.tolist()) for s in targets[example]}
        assert tuple(encoded.input_ids) in learnt


def test_functions_get_the_last_turn_and_all_messages(of_turns):
    run, _ = of_turns
    first, second, *_ = Inputs.open(run).rows["train"]
    assert for_functions(second)["prompt"] == second["prompt"].turns[-1].text
    assert [m["content"] for m in for_functions(second)["messages"]][:3] == ["Be brief.", "What is 8-4?", "Answer: 4."]
    assert for_functions(first)["messages"][-1] == {"role": "user", "content": "What is 8-4?"}
    assert for_functions({"prompt": "x", "a": 1}) == {"prompt": "x", "a": 1}


def test_judges_and_tables_see_the_conversation(of_turns):
    _, store = of_turns
    rows = pq.read_table(store.directory / "samples.parquet").to_pylist()
    assert rows[1]["prompt"].startswith("system: Be brief.\nuser: What is 8-4?\nassistant: Answer: 4.\nuser: ")
    chosen = [row["chosen"] for row in rows if row["chosen"]]
    assert chosen
    assert all([turn["content"] for turn in turns[:2]] == ["Be brief.", "What is 8-4?"] for turns in chosen)
    assert {len(turns) for turns in chosen} <= {3, 5}


def test_a_conversation_that_a_template_refuses_is_named(tmp_path):
    run = small_run(tmp_path)
    strict = Path(resolve("demo:guardian"), "chat_template.jinja").read_text()
    strict = "{% if messages | length > 2 %}{{ raise_exception('too long a talk') }}{% endif %}" + strict
    run.recipe.sources[0].chat_template = strict
    turns = ["Go.", "Going.", "Stop.", "Stopping."]
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, turns)]
    Path(str(run.recipe.data.train)).write_text(
        json.dumps({"messages": messages[:2]}) + "\n" + json.dumps({"messages": messages}) + "\n"
    )
    with pytest.raises(DataError, match=r"fusion\.jsonl, example 1 \(from 0\): .*too long a talk"):
        prepare(run)


SHOWN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SHOWN_IF = "{% for m in messages %}{% if CONDITION %}{{ m.role }}: {{ m.content }}\n{% endif %}{% endfor %}"
ONLY_LAST_ANSWER = SHOWN_IF.replace("CONDITION", "m.role != 'assistant' or loop.last")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + SHOWN


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (SHOWN, None),
        (NO_SYSTEM, None),  # the system message is in front of the first user message
        (SHOWN.replace("in messages", "in messages[-2:]"), "leaves out the system's where there are 2"),
        (ONLY_LAST_ANSWER, "leaves out the assistant's where there are 3"),
        ("{% if messages | length > 2 %}{{ raise_exception('too long') }}{% endif %}" + SHOWN, "too long"),
    ],
)
def test_a_reward_model_that_would_not_see_all_of_a_conversation_is_named_at_the_start(template, says):
    judge = JudgeConfig(name="j", model="demo:judge-a", chat_template=template)
    turns = (Turn("user", "Go."), Turn("assistant", "Going."), Turn("user", "Stop."))
    rows = [
        {"prompt": "x"},
        {"prompt": Conversation((Turn("system", "Be brief."), *turns[:1]))},
        {"prompt": Conversation(turns)},
    ]
    check_conversations(judge, rows[:1])
    if says is None:
        check_conversations(judge, rows)
        return
    with pytest.raises(DataError, match="judge j: ") as error:
        check_conversations(judge, rows)
    assert says in str(error.value)
