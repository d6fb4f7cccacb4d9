"""Lists whose items lie on the disk."""

import os
import tempfile
import tracemalloc
from itertools import islice

import numpy as np
import pytest

from profuser.disk_list import DiskList
from profuser.text.conversation import Conversation, Turn

ITEMS = ["a", {"prompt": "p", "n": None, "x": 1.5}, [("a", True)], "\ud800", b"\0\n", "", 3]


def test_it_is_a_list_of_what_was_put_in():
    found = DiskList(iter(ITEMS))
    assert (len(found), list(found), found[1], found[-1]) == (7, ITEMS, ITEMS[1], 3)
    assert found[2:5] == ITEMS[2:5]
    assert found[::-2] == ITEMS[::-2]
    assert found == ITEMS
    assert found != ITEMS[:-1]
    assert found != [*ITEMS[:-1], 4]
    assert ITEMS[3] in found
    assert list(reversed(found)) == ITEMS[::-1]
    assert DiskList() == []
    assert not DiskList()
    for beyond in (7, -8):
        with pytest.raises(IndexError):
            found[beyond]


def test_it_grows_and_what_is_read_is_a_copy():
    found = DiskList([{"a": [1]}])
    found[0]["a"].append(2)
    found.extend({"a": [n]} for n in (3, 4))
    assert found == [{"a": [1]}, {"a": [3]}, {"a": [4]}]
    found.extend([])
    assert len(found) == 3


def test_a_full_disk_is_named_by_the_folder_of_temporary_files(monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    found = DiskList()
    monkeypatch.setattr(found, "_file", open("/dev/full", "wb"))  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as error:
        found.extend(["a"])
    assert error.value.filename == tempfile.gettempdir()


def test_an_order_is_a_list_of_its_own():
    found = DiskList("abc")
    other = found.in_order(np.array([2, 0, 1]))
    assert (list(other), list(found), other[-1], other[:2]) == (["c", "a", "b"], ["a", "b", "c"], "b", ["c", "a"])
    del found
    assert other[0] == "c"  # the file is there as long as one of them


def test_items_that_are_written_while_others_are_read_do_not_disturb_them():
    found = DiskList(range(10))
    assert [n for n in islice(found, 3) if not found.extend([n])] == [0, 1, 2]
    assert found[10:] == [0, 1, 2]


def test_a_forked_process_has_it_as_well():
    found, (receive, send) = DiskList(["x" * 100, "y"]), os.pipe()
    if not (child := os.fork()):
        os.write(send, found[1].encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(receive, 9) == b"y"
    assert found[0] == "x" * 100


def test_conversations_are_those_that_were_put_in():
    prompt = Conversation((Turn("system", "s"), Turn("user", "u")))
    (found,) = DiskList([{"prompt": prompt}])
    assert found == {"prompt": prompt}
    assert type(found["prompt"]) is Conversation


def test_memory_does_not_grow_with_what_is_in_it():
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        found = DiskList("x" * 10_000 + str(n) for n in range(1_000))
        held = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert len(found) == 1_000
    assert held < 200_000  # the texts have ten million bytes
