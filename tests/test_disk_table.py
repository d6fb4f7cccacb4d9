"""Tables whose items lie on the disk."""

import tracemalloc

from profuser.disk_table import DiskTable, key_of


def test_items_stand_under_their_key_in_the_order_in_which_they_came():
    table: DiskTable[object] = DiskTable()
    for key, item in (("a", 1), ("b", [2]), ("a", {"x": 3})):
        table.add(key_of(key), item)
    assert [table[key_of(key)] for key in ("a", "b", "c")] == [[1, {"x": 3}], [[2]], []]
    assert [key_of(key) in table for key in ("a", "b", "c")] == [True, True, False]


def test_no_two_texts_share_a_key():
    texts = [
        ("a", "b"),
        ("ab",),
        ("ab", ""),
        ("a', 'b",),
        ("a\0b",),
        ("a\\x00b",),
        ("\ud800",),
        ("\\ud800",),
        (),
        ("",),
    ]
    assert len({key_of(*some) for some in texts}) == len(texts)
    assert key_of("ä", "x" * 10**6) == key_of("ä", "x" * 10**6)


def test_memory_hardly_grows_with_the_items():
    tracemalloc.start()
    try:
        table: DiskTable[str] = DiskTable()
        for n in range(2000):
            table.add(key_of(f"prompt {n}"), f"{n} " * 1000)
        assert tracemalloc.get_traced_memory()[0] < 2000 * 500
    finally:
        tracemalloc.stop()
    assert table[key_of("prompt 7")] == ["7 " * 1000]
