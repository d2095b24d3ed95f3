"""Whether a run fits: on numbers alone."""

from megatron_ext.model.fit import RankMemory, fits, usable_bytes

GIB = 2**30


def test_a_run_fits_into_what_is_left_of_the_memory() -> None:
    usable = usable_bytes(80 * GIB)
    assert usable == 74 * GIB
    assert fits(RankMemory(70 * GIB, 3 * GIB, 1 * GIB), 80 * GIB)
    assert not fits(RankMemory(70 * GIB, 3 * GIB, 1 * GIB + 1), 80 * GIB)
    assert usable_bytes(GIB) == 0
