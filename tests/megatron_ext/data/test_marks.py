import numpy as np

from megatron_ext.data.marks import MARKED_DTYPE, marked, stored_dtype, unmarked


def test_there_and_back() -> None:
    tokens, learned = np.array([0, 5, 0, 70_000]), np.array([False, False, True, True])
    stored = marked(tokens, learned)
    assert stored.tolist() == [-1, -6, 0, 70_000]
    assert stored.dtype == MARKED_DTYPE == stored_dtype("chat", 100)
    assert unmarked(stored).tolist() == tokens.tolist()
    assert ((stored >= 0) == learned).all()


def test_texts_have_no_marks() -> None:
    stored = np.array([0, 65_000], stored_dtype("pretraining", 65_100))
    assert stored.dtype == np.uint16
    assert unmarked(stored).tolist() == [0, 65_000]
