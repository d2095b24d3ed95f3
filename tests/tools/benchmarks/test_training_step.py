"""The benchmark of training steps: what it times."""

from tools.benchmarks.policies import policy_of
from tools.benchmarks.training_step import policies_at_work


def test_policies_are_timed_where_they_do_something() -> None:
    """DMS drops nothing that is not older than its window of 512 tokens."""
    long, short = policies_at_work(2048), policies_at_work(512)
    assert {"dmc:stage=retrofit", "dms:stage=retrofit"} <= {*long}
    assert {*long} - {*short} == {"dms:stage=retrofit"}
    assert all(not policy_of(text).traits.keeps_every_token for text in long)
