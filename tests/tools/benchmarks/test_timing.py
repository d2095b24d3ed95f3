"""The shared parts of benchmarks, and a tiny run of one that uses them."""

import csv
import gc
import time

import torch

from lckv.attention.key_bias import KeyBias
from lckv_megatron.measuring.timing import held_bytes, median_seconds, peak_bytes, write_csv
from tools.benchmarks import biased_attention, linear_cross_entropy, partial_attention


def test_functions_take_turns_and_the_median_counts():
    calls: list[str] = []
    pauses = iter([0.3, 0.0, 0.3, 0.0, 0.0])  # the first is warm-up, and one of the others is an outlier

    def slow() -> None:
        calls.append("slow")
        time.sleep(0.01)

    def uneven() -> None:
        calls.append("uneven")
        time.sleep(next(pauses))

    seconds = median_seconds({"slow": slow, "uneven": uneven}, repeats=4)
    assert calls == ["slow", "uneven"] * 5
    assert seconds["slow"] >= 0.01
    assert seconds["uneven"] < 0.3


def test_the_cpu_clock_does_not_count_waiting():
    def wait() -> None:
        time.sleep(0.05)

    assert median_seconds({"wait": wait}, repeats=1, clock="cpu")["wait"] < 0.04
    assert median_seconds({"wait": wait}, repeats=1)["wait"] >= 0.05


def test_peak_bytes_count_what_is_alive_at_once():
    def function() -> None:
        for _ in range(3):
            large = torch.zeros(1 << 20)
            del large
        both = [torch.zeros(1 << 19), torch.zeros(1 << 20)]
        assert len(both) == 2

    assert abs(peak_bytes(function) - 6 * 2**20) < 2**16


def test_csv(tmp_path):
    rows = [{"name": "a, b", "value": 1}, {"name": "c", "value": 2}]
    write_csv(tmp_path / "out.csv", rows)
    assert list(csv.DictReader((tmp_path / "out.csv").open())) == [
        {key: str(value) for key, value in row.items()} for row in rows
    ]


def test_the_benchmark_of_biased_attention(tmp_path, capsys):
    threads = torch.get_num_threads()
    output = tmp_path / "biased.csv"
    arguments = [
        "--lengths",
        "64",
        "128",
        "--dense-up-to",
        "64",
        "--heads",
        "2",
        "--kv-heads",
        "1",
        "--repeats",
        "1",
    ]
    biased_attention.main([*arguments, "--threads", str(threads), "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [(row["length"], row["variant"]) for row in rows] == [
        ("64", "plain"), ("64", "frontier"), ("64", "dense_bias"), ("128", "plain"), ("128", "frontier"),
    ]  # fmt: skip
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_the_variants_of_biased_attention_agree():
    inputs = biased_attention.make_inputs(96, 4, 2, 16, torch.float32, "cpu")
    frontier, dense = (biased_attention.attend(variant, *inputs) for variant in ("frontier", "dense_bias"))
    torch.testing.assert_close(frontier, dense, rtol=0, atol=1e-4)


def test_the_benchmark_of_chunks(tmp_path, capsys):
    output = tmp_path / "partial.csv"
    sizes = ["--length", "64", "--chunks", "2", "--heads", "2", "--kv-heads", "1", "--repeats", "1"]
    threads = ["--threads", str(torch.get_num_threads())]
    partial_attention.main([*sizes, *threads, "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [(row["keys"], row["chunks"]) for row in rows] == [
        ("dense", "1"), ("dense", "2"), ("biased", "1"), ("biased", "2"),
    ]  # fmt: skip
    assert [row["ratio_to_whole"] for row in rows[::2]] == ["1.0", "1.0"]
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_the_benchmark_of_the_loss(tmp_path, capsys):
    output = tmp_path / "loss.csv"
    sizes = ["--time-tokens", "8", "--time-hidden-size", "4", "--time-vocabulary", "16", "--repeats", "1"]
    sizes += ["--tokens", "64", "--hidden-size", "4", "--vocabularies", "32", "64"]
    linear_cross_entropy.main([*sizes, "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [row["loss"] for row in rows[:3]] == ["plain", "recomputing", "without logits"]
    assert rows[0]["time_ratio"] == "1.00"
    without, sums = (int(row["peak_bytes"]) for row in rows[-2:])
    assert without - sums == 64 * 4 * 4, "the weight's gradient"
    assert len(capsys.readouterr().out.splitlines()) == len(rows) == 10


def test_chunks_agree_with_the_whole():
    inputs = biased_attention.make_inputs(96, 4, 2, 16, torch.float32, "cpu")
    for key_bias in (None, KeyBias()):
        whole, *others = (partial_attention.attend(inputs, chunks, key_bias) for chunks in (1, 2, 4))
        for other in others:
            torch.testing.assert_close(other, whole, rtol=0, atol=1e-5)


def test_no_garbage_is_collected_while_bytes_are_counted() -> None:
    """It would count as freed."""
    assert gc.isenabled()
    assert held_bytes(lambda: gc.isenabled() or torch.zeros(10)) == 40
    assert gc.isenabled()
