"""The columns of a data set: found by their names, in whatever form it writes its examples down."""

import csv
import json
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from profuser.errors import ConfigError, DataError
from profuser.prepare.data import Examples, data_hash, load_examples
from profuser.prepare.inputs import load_split
from profuser.recipe.data import SPLITS, DataConfig, DataLocation, Split
from profuser.recipe.parse import parse_run
from profuser.text.conversation import Conversation, Turn
from profuser.text.template import conversation

HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
TWO_TURNS = [
    {"role": "system", "content": "Be brief."},
    *HELLO,
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": " A model. "},
]
ALPACA = {"prompt_column": "instruction", "response_column": "output"}


def written(path, *rows: dict):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(place, split: Split = "train", **settings) -> Examples:
    return load_examples(DataConfig(train=str(place), **settings), str(place), split=split)


def refusal(place, **settings) -> str:
    with pytest.raises(DataError) as error:
        examples(place, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def sharegpt(messages) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


# -- the forms -----------------------------------------------------------------------------------------------------------

FORMS = {
    "prompt, response": lambda q, a: {"prompt": q, "response": a},
    "prompt, completion": lambda q, a: {"prompt": q, "completion": a},
    "prompt, completion as messages": lambda q, a: {
        "prompt": [{"role": "user", "content": q}],
        "completion": [{"role": "assistant", "content": a}],
    },
    "Alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "Alpaca, in two parts": lambda q, a: {"instruction": q[: q.index("\n\n")], "input": q[q.index("\n\n") + 2 :], "output": a},
    "Dolly": lambda q, a: {"instruction": q, "context": None, "response": a},
    "question, answer": lambda q, a: {"question": q, "answer": a},
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "messages in parts": lambda q, a: {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": q[:3]}, {"type": "text", "text": q[3:]}]},
            {"role": "assistant", "content": [{"type": "text", "text": a}], "weight": 1, "tool_calls": None},
        ]
    },
    "ShareGPT": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "ShareGPT, begun by the assistant": lambda q, a: {
        "conversations": [{"from": "gpt", "value": "?"}, {"from": "human", "value": q}, {"from": "gpt", "value": a}]
    },
    "a conversation": lambda q, a: {"conversation": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path, form):
    """The requirement is exact: a hash of all rows is equal, and so is a store that is made of them."""
    texts = [(f"What is {n}\n\nand {n}? é\u2028", f" {2 * n}.\n") for n in range(5)]
    usual = examples(written(tmp_path / "usual.jsonl", *(FORMS["prompt, response"](*pair) for pair in texts)))
    rows = [FORMS[form](*pair) for pair in texts]
    path = written(tmp_path / "other.jsonl", *rows)
    found = examples(path)
    assert found == usual
    assert data_hash(found) == data_hash(usual)

    # The same in other files.
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert examples(tmp_path / "rows.json") == usual
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert examples(tmp_path / "rows.parquet") == usual
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    assert examples(tmp_path / "saved") == usual
    DatasetDict({"train": Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "dict"))
    assert examples(tmp_path / "dict") == usual
    spelt = [{key: json.dumps(x) if isinstance(x, list) else x for key, x in row.items()} for row in rows]
    assert examples(csv_file(tmp_path / "rows.csv", *spelt)) == usual


def csv_file(path, *rows: dict[str, Any]):
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.mark.parametrize(
    "text",
    [
        *('[{"role": "user"}]', "[1]", '{"a": "role"}', "[", "[]", '{"role": "user", "content": "x"}'),
        *('{"from": "Berlin", "value": 12}', '[{"from": "Alice", "value": "10"}]', '[{"role": "engineer", "content": "x"}]'),
        *('{"role": null, "content": "x"}', '[{"role": ["user"], "content": "x"}]', '{"from": 1, "value": "x"}'),
    ],
)  # fmt: skip
def test_json_that_is_no_message_stays_a_text(tmp_path, text):
    path = csv_file(tmp_path / "a.csv", {"prompt": text, "completion": text})
    assert [(row["prompt"], row["response"]) for row in examples(path)] == [(text, text)]


def test_messages_are_spelt_as_json_in_csv_files_alone(tmp_path):
    """Elsewhere a text can be told from a list, and is learnt as it stands."""
    row = {"prompt": json.dumps(HELLO[:1]), "completion": json.dumps(HELLO[1])}
    assert [(r["prompt"], r["response"]) for r in examples(csv_file(tmp_path / "a.csv", row))] == [("Hi", "Hello.")]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for path in (written(tmp_path / "a.jsonl", row), tmp_path / "a.parquet"):
        assert [(r["prompt"], r["response"]) for r in examples(path)] == [tuple(row.values())]


def test_what_a_csv_files_messages_say_beside_their_text_is_refused(tmp_path):
    call = [*HELLO, {"role": "tool", "content": "7"}, {"role": "user", "content": None, "tool_calls": [1]}]
    assert "'tool_calls'" in refusal(csv_file(tmp_path / "a.csv", {"prompt": json.dumps(call), "completion": "x"}))


def test_an_input_beside_messages_is_refused(tmp_path):
    path = written(tmp_path / "a.jsonl", {"instruction": HELLO[:1], "input": "x", "output": "Hello."})
    assert "the column 'input' must be empty where 'instruction' holds messages" in refusal(path)
    path = written(tmp_path / "a.jsonl", {"instruction": HELLO[:1], "input": " ", "output": "Hello."})
    assert [row["prompt"] for row in examples(path)] == ["Hi"]


def test_a_missing_cell_is_empty_however_it_is_written(tmp_path):
    """pandas writes NaN for what is missing, and so does Python's JSON."""
    nan = float("nan")
    rows = {"prompt": "Hi", "response": nan, "skill": nan, "system": nan}, {"prompt": nan, "response": "Hello."}
    expected = [("Hi", "", "all"), ("", "Hello.", "all")]
    path = written(tmp_path / "a.jsonl", *rows)
    assert "NaN" in path.read_text()
    assert [(row["prompt"], row["response"], row["skill"]) for row in examples(path)] == expected
    table = pyarrow.table({"prompt": ["Hi"], "response": pyarrow.array([nan])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row["response"] for row in examples(tmp_path / "a.parquet")] == [""]
    other = written(
        tmp_path / "b.jsonl", {"prompt": "Hi", "response": "x"}, {"question": "Hi", "prompt": nan, "response": "x"}
    )
    assert "the column 'prompt' must be filled in every row" in refusal(other)


def test_what_was_found_is_said_in_one_line(tmp_path):
    assert examples(written(tmp_path / "a.jsonl", {"prompt": "q", "response": "a"})).notes == []
    found = examples(written(tmp_path / "b.jsonl", {"instruction": "q", "input": "x", "output": "a"}))
    assert found.notes == [f"data {tmp_path / 'b.jsonl'}: prompts in 'instruction' and 'input', responses in 'output'"]
    found = examples(written(tmp_path / "two.jsonl", {"prompt": "q", "response": "a", "completion": "b"}))
    assert found.notes == [f"data {tmp_path / 'two.jsonl'}: prompts in 'prompt', responses in 'response'"]
    begun = [*HELLO[1:], *HELLO]
    found = examples(written(tmp_path / "c.jsonl", *[{"conversations": sharegpt(begun), "system": ""}] * 3))
    assert found.notes == [
        f"data {tmp_path / 'c.jsonl'}: conversations in 'conversations', system messages in 'system'",
        f"data {tmp_path / 'c.jsonl'}: 3 conversations begin with the assistant's turn, which is left out",
    ]
    system = {"from": "system", "value": "Be brief."}
    found = examples(written(tmp_path / "d.jsonl", {"conversations": [system, *sharegpt(begun)]}))
    assert found == examples(written(tmp_path / "e.jsonl", {"conversations": [system, *sharegpt(HELLO)]}))
    assert found.notes[1:] == [
        f"data {tmp_path / 'd.jsonl'}: 1 conversations begin with the assistant's turn, which is left out"
    ]


def test_other_columns_are_kept_and_those_of_the_recipe_are_read_as_they_were(tmp_path):
    path = written(tmp_path / "a.jsonl", {"messages": HELLO, "id": 7, "skill": "greeting"})
    assert examples(path) == [{"id": 7, "prompt": "Hi", "response": "Hello.", "skill": "greeting"}]
    named = written(tmp_path / "b.jsonl", {"q": "Hi", "a": "Hello.", "answer": 1})
    assert examples(named, prompt_column="q", response_column="a") == [
        {"q": "Hi", "a": "Hello.", "answer": 1, "prompt": "Hi", "response": "Hello.", "skill": "all"}
    ]


# -- conversations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [lambda m: {"messages": m}, lambda m: {"conversations": sharegpt(m)}])
def test_the_last_turn_is_learnt_or_all_are(tmp_path, form):
    path = written(tmp_path / "a.jsonl", form(TWO_TURNS), form(HELLO))
    last = examples(path)
    assert [row["response"] for row in last] == ["A model.", "Hello."]
    first = Turn("system", "Be brief."), Turn("user", "Hi")
    whole = Conversation((*first, Turn("assistant", "Hello."), Turn("user", "Who are you?")))
    assert [row["prompt"] for row in last] == [whole, "Hi"]
    every = examples(path, turns="all")
    assert [row["response"] for row in every] == ["Hello.", "A model.", "Hello."]
    assert [row["prompt"] for row in every] == [Conversation(first), whole, "Hi"]
    assert conversation(whole, "A model.") == [*TWO_TURNS[:-1], {"role": "assistant", "content": "A model."}]
    assert len(examples(path, turns="all", limit=None)) == 3
    assert len(load_examples(DataConfig(train="x", turns="all"), str(path), limit=2)) == 2


def test_a_system_column_is_the_first_message(tmp_path):
    path = written(
        tmp_path / "a.jsonl",
        {"system": "Be brief.", "instruction": "Hi", "output": "Ho"},
        {"instruction": "Hi", "output": "Ho"},
    )
    one, two = examples(path)
    assert one["prompt"] == Conversation((Turn("system", "Be brief."), Turn("user", "Hi")))
    assert two["prompt"] == "Hi"
    messages = written(tmp_path / "b.jsonl", {"system_prompt": "Be brief.", "messages": HELLO}, {"messages": TWO_TURNS})
    assert [row["prompt"].turns[0] for row in examples(messages)] == [Turn("system", "Be brief.")] * 2
    assert "one system message" in refusal(written(tmp_path / "c.jsonl", {"system": "Be long.", "messages": TWO_TURNS}))


def test_two_conversations_with_the_same_text_have_different_hashes(tmp_path):
    """What the roles are decides what a model sees, though the texts in a row are the same."""
    two = [{"role": "user", "content": "a\nassistant: b\nuser: c"}, {"role": "assistant", "content": "d"}]
    three = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, "abcd")]
    found = [examples(written(tmp_path / f"{n}.jsonl", {"messages": m})) for n, m in enumerate((two, three))]
    assert len({data_hash(rows) for rows in found}) == 2


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "must end with the assistant's turn"),
        (HELLO[:1], "must end with the assistant's turn, the ground truth, got 'user'"),
        ([*HELLO, *HELLO[1:]], "speak in turn"),
        ([HELLO[0], HELLO[0], HELLO[1]], "speak in turn"),
        ([HELLO[0], {"role": "tool", "content": "7"}, HELLO[1]], "got 'tool'"),
        ([*sharegpt(HELLO[:1]), {"from": "tool_result", "value": "f"}, *sharegpt(HELLO[1:])], "got 'tool_result'"),
        ([HELLO[0], HELLO[1] | {"tool_calls": [{"name": "f"}]}], "'tool_calls'"),
        ([HELLO[0], HELLO[1] | {"reasoning_content": "So."}], "'reasoning_content'"),
        ([HELLO[0], HELLO[1] | {"reasoning": "So."}], "'reasoning'"),
        ([HELLO[1], *HELLO], "in place of user in message 1; take it out, or add the user's before it"),
        ([HELLO[0], HELLO[1] | {"weight": 0}], "'weight'"),
        ([HELLO[0], HELLO[1] | {"train": False}], "'train'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, HELLO[1]], "image_url"),
        ([{"role": "user", "content": 7}, HELLO[1]], "must be a text"),
        ([{"role": "user", "content": ""}, HELLO[1]], "must be a text"),
        ([{"content": "Hi"}, HELLO[1]], "the role of message 1"),
        (["Hi", "Hello."], "must hold a list of messages"),
        ({"role": "user"}, "must hold a list of messages"),
        ("[1", "must hold a list of messages"),
        (None, "must hold a list of messages"),
    ],
)  # fmt: skip
def test_a_conversation_that_is_none_is_named_with_file_row_and_column(tmp_path, messages, expected):
    message = refusal(written(tmp_path / "a.jsonl", {"messages": HELLO}, {"messages": messages}))
    assert expected in message
    assert f"data {tmp_path / 'a.jsonl'}, row 1 (from 0): " in message
    assert "messages'" in message


# -- layouts of data sets on the Hub -------------------------------------------------------------------------------------


def user(text, **keys):
    return {"role": "user", "content": text} | keys


def assistant(text, **keys):
    return {"role": "assistant", "content": text} | keys


GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
PUBLISHED = {
    "WildChat": {
        "conversation": [
            user("Hi", country="US", header={"user-agent": "x"}, redacted=False, timestamp=None, turn_identifier=1),
            assistant("Hello.", country=None, header=None, redacted=False, timestamp="t", turn_identifier=1),
        ],
        "openai_moderation": [{"categories": {"harassment": False}}], "turn": 1, "toxic": False,
    },
    "LMSYS-Chat-1M": {"conversation_id": "x", "conversation": HELLO, "openai_moderation": [{"flagged": False}], "redacted": False},
    "UltraChat": {"prompt": "Hi", "prompt_id": "x", "messages": HELLO},
    "UltraFeedback, binarized": {"prompt": "Hi", "chosen": HELLO, "rejected": HELLO, "messages": HELLO, "score_chosen": 1.0},
    "Tulu": {"id": "x", "messages": HELLO, "source": "s"},
    "OpenHermes": {"conversations": [m | {"weight": None} for m in GPT], "system_prompt": None, "idx": None, "source": "s"},
    "SlimOrca": {"conversations": [GPT[0] | {"weight": 0.0}, GPT[1] | {"weight": 1.0}]},
    "ShareGPT of Vicuna": {"id": "x", "conversations": [m | {"markdown": None, "text": None} for m in GPT]},
    "LLaMA-Factory": {"conversations": GPT, "system": "", "tools": "[]", "images": []},
    "OpenOrca": {"id": "x", "system_prompt": "", "question": "Hi", "response": "Hello."},
    "MetaMathQA": {"type": "t", "query": "Hi", "original_question": "H", "response": "Hello."},
    "GSM8K": {"question": "Hi", "answer": "Hello."},
    "TRL, ShareGPT's keys": {"prompt": GPT[:1], "completion": GPT[1:]},
    "TRL, a message alone": {"prompt": HELLO[:1], "completion": HELLO[1]},
    "roles in capital letters": {"messages": [{"role": "User", "content": "Hi"}, {"role": "Assistant", "content": "Hello."}]},
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_layouts_of_published_data_sets_are_read(tmp_path, name):
    rows = [PUBLISHED[name]] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (written(tmp_path / "a.jsonl", *rows), tmp_path / "a.parquet"):
        assert [(row["prompt"], row["response"]) for row in examples(path)] == [("Hi", "Hello.")] * 2


REFUSED = {
    "Anthropic's HH": ({"chosen": "\n\nHuman: Hi", "rejected": "x"}, {}, "preferences, found: chosen, rejected"),
    "HH, named": ({"chosen": "\n\nHuman: Hi", "rejected": "x"}, {"messages_column": "chosen"}, "got '\\n\\nHuman: Hi'; write a list"),
    "DPO": ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, {}, "data.response_column: chosen"),
    "UltraFeedback": ({"instruction": "Hi", "completions": []}, {}, "found: instruction, completions"),
    "Capybara": ({"conversation": [{"input": "Hi", "output": "a"}]}, {}, "the role of message 1 in the column 'conversation'"),
    "LIMA": ({"conversations": ["Hi", "a"]}, {}, "each has a role and a content"),
    "Magpie": ({"instruction": "Hi", "response": "a", "conversations": GPT}, {}, "data.messages_column: conversations"),
    "two conversations": ({"messages": HELLO, "conversations": GPT}, {}, "'messages' beside 'conversations'"),
    "SQuAD": ({"context": "c", "question": "q", "answer": "a"}, {}, "join it with 'question'"),
    "an input beside a prompt": ({"prompt": "c", "input": 0, "response": "a"}, {}, "join it with 'prompt'"),
    "OpenOrca, named": (
        {"system_prompt": "Be.", "question": "q", "response": "a"}, {"prompt_column": "question"}, "take data.prompt_column",
    ),
    "tools": ({"messages": HELLO, "tools": [{"function": {"name": "f"}}]}, {}, "the column 'tools' must be empty"),
    "tools in a text": ({"messages": HELLO, "tools": '[{"name": "f"}]'}, {}, "the column 'tools' must be empty"),
    "images": ({"messages": HELLO, "Images": ["x.png"]}, {}, "the column 'Images' must be empty"),
    "of a template": ({"messages": HELLO, "chat_template_kwargs": {"custom_instructions": "Be."}}, {}, "must be empty"),
    "written by pandas": ({"messages": str(HELLO)}, {}, "write it as JSON"),
    "text in another key": ({"messages": [*HELLO[:1], {"role": "assistant", "text": "a"}]}, {}, "it has one in 'text'"),
    "keys of both kinds": ({"messages": [*HELLO[:1], {"role": "assistant", "value": "a"}]}, {}, "it has one in 'value'"),
    "weight of a half": ({"messages": [HELLO[0], HELLO[1] | {"weight": 0.5}]}, {}, "'weight', which is not read, got 0.5"),
    "not learnt": ({"prompt": "Hi", "completion": [HELLO[1] | {"train": False}]}, {}, "'train' that says it is not"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_layouts_that_would_lose_something_lead_on(tmp_path, name):
    row, settings, expected = REFUSED[name]
    assert expected in refusal(written(tmp_path / "a.jsonl", row), **settings)


def test_a_turn_that_is_not_learnt_is_context(tmp_path):
    """A weight of 0 is what every earlier turn has anyway where the last is learnt, and leaves a turn out where all are."""
    talk = [
        user("a", weight=0),
        assistant("b", weight=0),
        user("c"),
        assistant("d", weight=1),
        user("e"),
        assistant("f"),
    ]
    path = written(tmp_path / "a.jsonl", {"messages": talk}, {"messages": talk[:4]})
    assert [row["response"] for row in examples(path)] == ["f", "d"]
    assert [row["response"] for row in examples(path, turns="all")] == ["d", "f", "d"]
    muted = written(tmp_path / "b.jsonl", {"messages": [*talk[2:4], user("e"), assistant("f", loss=False)]})
    assert [row["response"] for row in examples(muted, turns="all")] == ["d"]
    assert "'loss' that says it is not" in refusal(muted)
    assert "'weight' that says it is not" in refusal(written(tmp_path / "c.jsonl", {"messages": talk[:2]}), turns="all")


def test_rows_that_are_written_in_two_ways_are_refused(tmp_path):
    """A row would otherwise have an empty prompt or ground truth, and the text in a column that is not read."""
    rows = {"prompt": "Hi", "response": "Hello."}, {"prompt": "Hi", "completion": "Hello."}
    assert "row 1 (from 0): the column 'response' must be filled" in refusal(written(tmp_path / "one.jsonl", *rows))
    message = refusal(written(tmp_path / "two.jsonl", rows[0], {"question": "Hi", "response": "Hello."}))
    assert "row 1 (from 0): the column 'prompt' must be filled in every row, it has nothing and 'question'" in message
    empty = written(tmp_path / "empty.jsonl", rows[0], {"prompt": "Hi", "response": None}, {"prompt": "Hi"})
    assert [row["response"] for row in examples(empty)] == ["Hello.", "", ""]
    # A CSV file has no other way to say that there is nothing.
    for n, (column, row) in enumerate({"prompt": ",q2,r2,", "response": "p2,,,c2"}.items()):
        path = tmp_path / f"{n}.csv"
        path.write_text(f"prompt,question,response,completion\np1,,r1,\n{row}\n")
        assert f"row 1 (from 0): the column {column!r} must be filled in every row, it has nothing and" in refusal(path)
    alike = written(tmp_path / "alike.jsonl", rows[0] | {"answer": "x"}, {"prompt": "a", "response": "", "answer": "x"})
    assert [row["response"] for row in examples(alike)] == ["Hello.", ""]


def test_a_file_is_read_once_by_whatever_names(tmp_path):
    file = written(tmp_path / "0.jsonl", {"prompt": "Hi", "response": "Hello."})
    pattern = str(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match=r"must name every file once, \S+/0\.jsonl is named more than once in"):
        load_examples(DataConfig(train="a"), DataLocation(path=[str(file), pattern]))
    (tmp_path / "latest.jsonl").symlink_to("0.jsonl")
    with pytest.raises(
        DataError, match=r"must name every file once, \S+/0\.jsonl and \S+/latest\.jsonl are one file in"
    ):
        load_examples(DataConfig(train="a"), DataLocation(path=pattern))
    with pytest.raises(DataError, match="are one file"):
        load_examples(DataConfig(train="a"), DataLocation(path=str(tmp_path)))


def test_files_of_a_split_may_be_written_in_different_ways(tmp_path):
    talk = [user("Hi"), assistant("Hello.")]
    rows = [
        {"messages": talk, "id": 7},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"prompt": "Hi", "response": "Hello.", "answer": "x"},
        {"question": "Hi", "answer": "Hello."},
        {"instruction": "Hi", "input": "", "output": "Hello."},
    ]
    for n, row in enumerate(rows):
        written(tmp_path / f"{n}.jsonl", row)
    found = examples(tmp_path / "?.jsonl", drop_duplicates=False)
    assert [(row["prompt"], row["response"]) for row in found] == [("Hi", "Hello.")] * 5
    # A column beside those that were read stays where it is, and nobody has one that is nothing but how another file is written.
    assert [row.get("answer") for row in found] == [None, None, "x", None, None]
    assert [row.get("id") for row in found] == [7, None, None, None, None]
    assert not {"messages", "conversations", "question", "instruction"} & {column for row in found for column in row}
    assert [note.partition(".jsonl: ")[2] for note in found.notes] == [
        "conversations in 'messages'", "conversations in 'conversations'", "prompts in 'question', responses in 'answer'",
        "prompts in 'instruction' and 'input', responses in 'output'",
    ]  # fmt: skip
    # A file without a column that the others have is read as they are.
    written(tmp_path / "b0.jsonl", {"prompt": "Hi", "response": "Hello."})
    written(tmp_path / "b1.jsonl", {"prompt": "Hi"})
    assert [row["response"] for row in examples(tmp_path / "b?.jsonl", drop_duplicates=False)] == ["Hello.", ""]
    written(tmp_path / "c1.jsonl", {"text": "Hi"})
    written(tmp_path / "c0.jsonl", {"x": "Hi"})
    assert "c0.jsonl must have the columns prompt and response" in refusal(tmp_path / "c?.jsonl")


def test_one_system_message_in_two_places_is_one(tmp_path):
    row = {"system": " Be brief.\n", "messages": TWO_TURNS}
    assert examples(written(tmp_path / "a.jsonl", row)) == examples(
        written(tmp_path / "b.jsonl", {"messages": TWO_TURNS})
    )


def test_shares_are_taken_of_the_split_that_is_trained_on(tmp_path):
    """A folder's own split of the name `validation` is not read where a share of the training data is asked for."""
    for split in ("train", "validation", "test"):
        written(tmp_path / f"{split}.jsonl", *({"prompt": f"{split} {n}", "response": "a"} for n in range(40)))
    settings = {"heldout_share": 0.3, "validation_share": 0.3, "train": str(tmp_path)}
    run = parse_run("prepare", [f"--data={json.dumps(settings)}", "--data.heldout=null", "--data.validation=null"])
    found = {split: [row["prompt"] for row in load_split(run.recipe, split)] for split in SPLITS}
    assert sorted(prompt for prompts in found.values() for prompt in prompts) == sorted(f"train {n}" for n in range(40))
    assert all(found.values())


# -- which columns -------------------------------------------------------------------------------------------------------


def test_columns_of_two_kinds_are_ambiguous(tmp_path):
    path = written(tmp_path / "a.jsonl", {"prompt": "Hi", "response": "Hello.", "messages": HELLO})
    assert "data.messages_column: messages" in refusal(path)
    assert [row["response"] for row in examples(path, messages_column="messages")] == ["Hello."]
    only_prompts = written(tmp_path / "b.jsonl", {"prompt": "Hi", "prompt_id": "x", "messages": HELLO})
    assert [row["response"] for row in examples(only_prompts)] == ["Hello."]


def test_a_column_of_another_name_has_to_be_named(tmp_path):
    path = written(tmp_path / "a.jsonl", {"dialogue": HELLO, "source": "web"})
    message = refusal(path)
    assert "found: dialogue, source" in message
    assert "messages or conversations or conversation" in message
    assert [row["prompt"] for row in examples(path, messages_column="dialogue")] == ["Hi"]
    assert "data.messages_column" in refusal(path, messages_column="dialog")
    assert "data.response_column" in refusal(written(tmp_path / "b.jsonl", {"q": "a", "a": "b"}), prompt_column="q")
    with pytest.raises(ConfigError, match="must stand alone"):
        DataConfig(train="a", messages_column="m", prompt_column="q")


def test_a_part_of_the_prompt_is_not_dropped(tmp_path):
    """Where the recipe names the columns, a part of the prompt beside them is an error, and the fix is to name none."""
    whole, empty = (
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": " ", "output": "Ho"},
    )
    path = written(tmp_path / "a.jsonl", empty, whole)
    message = refusal(path, **ALPACA)
    assert "row 1 (from 0): the column 'input'" in message
    assert "take data.prompt_column and data.response_column out" in message
    assert [row["prompt"] for row in examples(path)] == ["Hi", "Add.\n\n1 2"]
    assert len(examples(written(tmp_path / "b.jsonl", empty, empty), **ALPACA)) == 2
    inputs = written(tmp_path / "c.jsonl", {"input": "1 2", "output": "3"})
    assert len(examples(inputs, prompt_column="input", response_column="output")) == 1
    for column in ("history", "Input", "System"):
        row = {"instruction": "Add 1 2.", "output": "3", column: "Be brief."}
        assert f"the column '{column}'" in refusal(written(tmp_path / f"{column}.jsonl", row))
    renamed = written(tmp_path / "e.jsonl", {"instruction": "Add 1 2.", "was_input": "1 2", "output": "3"})
    assert len(examples(renamed, **ALPACA)) == 1


# -- several files, and which examples -----------------------------------------------------------------------------------


def test_several_files_and_patterns(tmp_path):
    (tmp_path / "more").mkdir()
    written(tmp_path / "a.jsonl", {"prompt": "a", "response": "a"})
    written(tmp_path / "more" / "c.jsonl", {"prompt": "c", "response": "c"})
    written(tmp_path / "more" / "b.jsonl", {"prompt": "b", "response": "b"})
    config = DataConfig(train=[str(tmp_path / "a.jsonl"), str(tmp_path / "more" / "*.jsonl")])
    location = config.location("train")
    assert location is not None
    assert [row["prompt"] for row in load_examples(config, location)] == ["a", "b", "c"]
    assert [row["prompt"] for row in examples(tmp_path / "**" / "[ab].jsonl")] == ["a", "b"]
    assert "no file fits the pattern" in refusal(tmp_path / "*.csv")
    assert (
        DataConfig(train=["a.jsonl"]) == DataConfig(train="a.jsonl") == DataConfig(train=DataLocation(path=["a.jsonl"]))
    )
    for empty in ([], DataLocation(path=[], split="train")):
        with pytest.raises(ConfigError, match="an empty list"):
            DataConfig(train=empty)
    assert DataConfig(train=DataLocation(path=["a"], split="x")) == DataConfig(train=DataLocation(path="a", split="x"))
    with pytest.raises(ConfigError, match="write each of them in quotes"):
        DataConfig(train="[*.jsonl, b.jsonl]")  # what YAML makes of it on a command line
    assert "no file fits the pattern" in refusal("part-*")
    written(tmp_path / "more" / "b.jsonl", {"prompt": "b", "response": "b"}, {"prompt": "b", "response": ["b"]})
    message = refusal(tmp_path / "more" / "*.jsonl")
    assert f"data {tmp_path / 'more' / 'b.jsonl'}, row 1 (from 0): the column 'response'" in message


def test_of_equal_prompts_the_first_is_used(tmp_path):
    rows = [{"prompt": p, "response": str(n)} for n, p in enumerate(("a b", "c", "a  b\n", "C", "c"))]
    path = written(tmp_path / "a.jsonl", *rows)
    assert [row["response"] for row in examples(path)] == list("01234")
    found = examples(path, drop_duplicates=True)
    assert [row["response"] for row in found] == list("013")
    assert found.notes == [f"data {path}: 2 examples with the prompt of an earlier one, dropped"]
    assert len(examples(path, "heldout", drop_duplicates=True)) == 5  # a score is over all that was asked


def test_shares_are_held_out_by_a_hash_of_the_first_prompt(tmp_path):
    """Splits do not overlap, whatever the order of the rows, and a conversation is in one of them with all its turns."""
    talks = [
        [{"role": r, "content": f"{c} {n}"} for c, r in zip("abcd", ("user", "assistant") * 2)] for n in range(400)
    ]
    path = written(tmp_path / "a.jsonl", *({"messages": m, "skill": str(n)} for n, m in enumerate(talks)))
    back = written(
        tmp_path / "b.jsonl", *({"messages": m, "skill": str(n)} for n, m in reversed(list(enumerate(talks))))
    )
    found = {}
    for split in ("train", "heldout", "validation"):
        of_files = []
        for file in (path, back):
            config = DataConfig(train=str(file), heldout_share=0.1, validation_share=0.2, turns="all")
            location = config.location(split)
            assert location is not None
            rows = load_examples(config, location, None, split, config.part(split))
            of_files.append(sorted(row["skill"] for row in rows))
        assert of_files[0] == of_files[1]
        found[split] = set(of_files[0])
        assert len(of_files[0]) == 2 * len(found[split])
    assert sum(map(len, found.values())) == len(set.union(*found.values())) == 400
    assert 20 < len(found["heldout"]) < 60 < len(found["validation"]) < 110
    assert DataConfig(train="a", heldout="b").location("validation") is None
    assert DataConfig(train="a", heldout="b", validation_share=0.1).part("heldout") == (0.0, 1.0)
    wrong: list[dict[str, Any]] = [
        {"heldout_share": 1.0},
        {"heldout_share": -0.1},
        {"heldout_share": 0.6, "validation_share": 0.5},
        {"heldout": "b", "heldout_share": 0.1},
    ]
    for settings in wrong:
        with pytest.raises(ConfigError):
            DataConfig(train="a", **settings)


def test_bad_rows_are_counted_and_left_out_where_the_recipe_says_so(tmp_path):
    good = [user("Hi"), assistant("Hello.")]
    path = written(
        tmp_path / "a.jsonl",
        {"messages": good},
        {"messages": [*good, user("And?")]},
        {"messages": []},
        {"messages": [user("Hi")]},
        {"messages": "no list"},
        {"messages": [user("Hi"), {"role": "function_call", "content": "f()"}]},
        {"messages": [*good, user("You?"), assistant("Me.")]},
    )
    assert "row 1 (from 0)" in (message := refusal(path))
    assert message.endswith(", or set data.bad_rows: skip")
    found = examples(path, bad_rows="skip")
    assert [row["response"] for row in found] == ["Hello.", "Me."]
    counts = [note.partition("a.jsonl: ")[2] for note in found.notes if "left out" in note]
    assert sum(int(count.partition(" ")[0]) for count in counts) == 5
    assert (
        "4 x row left out, because the column 'messages' must end with the assistant's turn, the ground truth" in counts
    )
    assert len(examples(path, "heldout", bad_rows="skip")) == 2
    limited = load_examples(DataConfig(train=str(path), bad_rows="skip"), str(path), limit=2)
    assert [row["response"] for row in limited] == ["Hello.", "Me."]
    none = refusal(written(tmp_path / "b.jsonl", {"messages": [user("Hi")]}), bad_rows="skip")
    assert "all were left out: " in none
    assert "1 x row left out, because the column 'messages' must end with" in none
