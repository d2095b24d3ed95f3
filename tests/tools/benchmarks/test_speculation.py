"""The benchmark of speculative decoding, at a tiny size."""

import csv
from pathlib import Path

import torch

from tools.benchmarks.speculation import main


def test_a_tiny_run(tmp_path: Path) -> None:
    output = tmp_path / "speculation.csv"
    sizes = "--layers 4 --heads 2 --kv-heads 1 --head-dim 16 --vocab-size 600 --new-tokens 24 --memory-mib 4"
    threads = ["--threads", str(torch.get_num_threads())]
    main(
        [
            *sizes.split(),
            *threads,
            "--maps",
            "lckv",
            "--tokens",
            "3",
            "--repeats",
            "1",
            "--output",
            str(output),
        ]
    )
    rows = {(row["text"], row["speculation_tokens"]): row for row in csv.DictReader(output.open())}
    assert list(rows) == [("edit", "0"), ("article", "0"), ("edit", "3"), ("article", "3")]
    for text in ("edit", "article"):
        assert (rows[text, "0"]["steps"], rows[text, "0"]["acceptance"], rows[text, "0"]["ratio"]) == (
            "24",
            "",
            "1.0",
        )
    assert int(rows["edit", "3"]["steps"]) < 16
