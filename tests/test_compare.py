"""The control of the comparison that moves every KD row by one token."""

import numpy as np

from profuser.experiments.compare import shifted


def test_shifted_rows_stand_one_label_later_and_lose_nothing_else():
    shard = {
        "row_offsets": np.array([0, 3, 3, 6]),
        "row_position": np.array([5, 6, 8, 2, 3, 2], np.int32),
        "row_source": np.array([0, 0, 0, 0, 0, 1], np.uint8),
        "row_tail": np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32),
        "row_reliability": np.arange(6, dtype=np.uint8),
        "entry_offsets": np.array([0, 2, 3, 6, 7, 8, 10]),
        "entry_ids": np.arange(10, dtype=np.uint16),
        "entry_logprobs": np.arange(10, dtype=np.float16),
        "input_ids": np.arange(4),
    }
    out = shifted(shard)
    assert out["row_offsets"].tolist() == [0, 2, 2, 3]
    assert out["row_position"].tolist() == [6, 8, 3]
    assert out["row_source"].tolist() == [0, 0, 0]
    np.testing.assert_allclose(out["row_tail"], [0.1, 0.2, 0.4])
    assert out["entry_offsets"].tolist() == [0, 2, 3, 4]
    assert out["entry_ids"].tolist() == [0, 1, 2, 6]
    assert out["input_ids"] is shard["input_ids"]
