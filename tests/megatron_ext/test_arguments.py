"""Options: their spelling, and the texts of their values."""

import argparse

import pytest

from megatron_ext.arguments import DashedParser, ProgramParser, memory_size, positive, seconds


@pytest.mark.parametrize(
    "words",
    [
        ["--new-tokens", "3", "--text", "a_b"],
        ["--new_tokens", "3", "--text", "a_b"],
        ["--new_tokens=3", "--text=a_b"],
    ],
)
def test_options_have_dashes_and_their_old_underscores_are_understood(words: list[str]) -> None:
    parser = ProgramParser("sample", "Words.")
    parser.add_argument("--new-tokens", type=int)
    parser.add_argument("--text")
    assert vars(parser.parse_args(words)) == {"new_tokens": 3, "text": "a_b"}
    assert parser.prog == "lckv-megatron sample"


def test_other_words_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    parser = DashedParser(allow_abbrev=False)
    parser.add_argument("--model.layer_types")
    parser.add_argument("--print-config", action="store_true")
    known, rest = parser.parse_known_args(["--model.layer_types", "0_0", "--section.some_key", "x_y"])
    assert known.__dict__["model.layer_types"] == "0_0"
    assert rest == ["--section.some_key", "x_y"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--no_option"])
    assert "unrecognized arguments: --no_option" in capsys.readouterr().err


def test_texts_of_values() -> None:
    sizes = ("16GiB", "1.5 gb", "4096", "1KiB", "7B", "500M", "2k")
    assert [memory_size(text) for text in sizes] == [2**34, 1_500_000_000, 4096, 1024, 7, 500_000_000, 2000]
    assert positive("12") == 12
    for text in ("16 potatoes", "-1GiB", "0", "", "GiB"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a size in memory such as 16GiB"):
            memory_size(text)
    for text in ("0", "-1", "1.5", "x", "²"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a whole number of at least 1"):
            positive(text)
    assert (seconds("30"), seconds("0.5")) == (30, 0.5)
    for text in ("0", "-1", "x", "inf", "nan", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a number of seconds above 0"):
            seconds(text)
