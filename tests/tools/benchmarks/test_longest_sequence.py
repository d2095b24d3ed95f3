"""The benchmark of the longest rows finds what fits, and no less."""

import pytest

from megatron_ext.command_line import parse_run_config
from tools.benchmarks.longest_sequence import dry_run, longest, ways

RUN = parse_run_config(
    [
        "--model.num_layers=2", "--model.hidden_size=64", "--model.num_attention_heads=2",
        "--model.vocab_size=64", "--data.mock=true", "--train.activation_offload=token_wise",
        "--train.offload_fraction=0", "--train.offload_host_gib=1.25",
    ]
)  # fmt: skip
TOKENS, USABLE = 4096, 24 * 2**20


def test_what_fits_is_found_and_the_host_bounds_it() -> None:
    (_, stay), _, (_, swapped) = ways(RUN)
    most, result = longest(stay, dry_run(stay, TOKENS), TOKENS, USABLE, multiple=64)
    assert 0.95 * USABLE < result.memory.peak_bytes <= USABLE
    assert dry_run(stay, most).memory.peak_bytes == result.memory.peak_bytes
    # 80 % of the pool are for input and output of two layers in 16 bits and the lse of two heads
    limit, _ = longest(swapped, dry_run(swapped, TOKENS), TOKENS, 2**50, multiple=64)
    assert limit == pytest.approx(2**30 / (2 * (2 * 2 * 64 + 2 * 4)), rel=1e-3)
    with pytest.raises(ValueError, match="no rows of a multiple of 64 tokens were found that fit into 1 "):
        longest(stay, result, most, 1, multiple=64)
