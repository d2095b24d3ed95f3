"""The benchmark of inference as a program, on tiny models."""

import csv
import json

import pytest
import torch

from lckv_megatron.measuring.comparison import OF_LARGEST_BATCH, rows
from tests.lckv.models.folders import save_folder, save_merging_folder
from tools.benchmarks import inference

RANDOM = [
    "--layers",
    "4",
    "--hidden-size",
    "32",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--vocab-size",
    "64",
    "--sliding-window",
    "8",
]
SMALL = [
    "--lengths",
    "16",
    "40",
    "--context",
    "48",
    "--batches",
    "2",
    "--repeats",
    "1",
    "--prompts",
    "2",
    "--device",
    "cpu",
]
SMALL += ["--threads", str(torch.get_num_threads())]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_folder(folder / "plain")
    save_merging_folder(folder / "merging", "0_3_3_3")
    (folder / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": f"text number {index} of many"}) for index in range(50))
    )
    return folder


def test_models_with_random_weights(tmp_path, capsys):
    output, picture = tmp_path / "inference.csv", tmp_path / "inference.png"
    merging = "dmc:stage=finetune:target_compression_ratio=4"
    models = [*inference.RANDOM, f"DMC 4x=plain,{merging}", f"LCKV x DMC=lckv,{merging}"]
    options = ["--random", *models, *RANDOM, *SMALL, "--output", str(output), "--picture", str(picture)]
    assert inference.main(options) == 0
    found = list(csv.DictReader(output.open()))
    names = [text.partition("=")[0] for text in models]
    assert [row["model"] for row in found if row["measure"] == "tokens per second"] == names
    assert all(float(row["value"]) > 0 for row in found)
    assert all(float(row["ratio"]) == 1 for row in found if row["model"] == "plain")
    assert {row["at"] for row in found if row["measure"] == "prefill"} == {"16", "40"}
    iterated = {row["model"] for row in found if row["measure"] == "prefill, all passes"}
    assert iterated == {"plain", "LCKV", "LCKV x DMC"}
    by_name = {(row["model"], row["measure"]): float(row["value"]) for row in found}
    assert by_name["plain", "largest batch"] == inference.PLAIN_SEQUENCES
    assert by_name["plain", "KV bytes per token"] == pytest.approx(4 * 2 * 2 * 8 * 4, rel=0.1)
    assert by_name["DMC 4x", "tokens per slot"] > 2
    table = capsys.readouterr().out.splitlines()
    assert table[0].split("  ")[-1] == names[-1]
    assert len(table) - 1 == len(
        {(row["measure"], None if row["measure"] in OF_LARGEST_BATCH else row["at"]) for row in found}
    )
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_folders_are_measured_on_texts(folders, tmp_path):
    output = tmp_path / "inference.csv"
    models = [
        "--models",
        str(folders / "plain"),
        f"both={folders / 'merging'}",
        "--text",
        str(folders / "texts.jsonl"),
    ]
    assert inference.main([*models, *SMALL, "--output", str(output)]) == 0
    found = list(csv.DictReader(output.open()))
    assert {(row["model"], row["policy"], row["layer_types"]) for row in found} == {
        ("plain", "dense", "0_1_2"), ("both", "dmc", "0_3_3_3"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--models PLAIN PLAIN", "the models are called plain, plain; each needs a name of its own"),
        (
            "--models PLAIN --lengths 64",
            "has a context of 64 tokens, but 65 are measured; give smaller --lengths",
        ),
        (
            "--models PLAIN --context 3",
            "--context is 3; it must be more than the 3 tokens that --repeats 1 decodes",
        ),
        (
            "--prefill-tolerance 1",
            "--prefill-tolerance is 1.0; it must be at least 0 (all passes) and below 1",
        ),
        ("--output PLAIN/config.json/inference.csv", "inference.csv cannot be written: "),
        ("--models PLAIN --text nowhere.txt", "nowhere.txt"),
        ("--models nowhere", "nowhere/config.json does not exist"),
        (
            "--random plain --memory 1KiB",
            "--memory 1.00 KiB does not hold one sequence of 48 tokens of plain",
        ),
        ("--random 0_0", "compression.layer_types"),
    ],
)
def test_bad_requests(folders, arguments, message, capsys):
    given = arguments.replace("PLAIN", str(folders / "plain")).split()
    assert inference.main([*RANDOM, *SMALL, *given]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_tokenizer(folders, tmp_path, capsys):
    save_folder(tmp_path / "mute")
    for file in tmp_path.glob("mute/tokenizer*"):
        file.unlink()
    models = ["--models", str(tmp_path / "mute"), "--text", str(folders / "texts.jsonl")]
    assert inference.main([*models, *SMALL]) == 2
    assert "mute has no tokenizer for --text; put its files into the folder" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["plain,dmc:target_compression_ratio=0", "plain,cr=2"])
def test_bad_random_models(text, capsys):
    with pytest.raises(SystemExit):
        inference.main(["--random", text])
    assert "policy." in capsys.readouterr().err


def test_ratios_are_to_the_first_model():
    found = rows("prefill", 8, "ms", {"a": 4.0, "b": 2.0})
    assert [(row.at, row.ratio) for row in found] == [(8, 1.0), (8, 0.5)]
    assert [row.at for row in rows("tokens per second", {"a": 3, "b": 7}, "1/s", {"a": 1.0, "b": 1.0})] == [
        3,
        7,
    ]
