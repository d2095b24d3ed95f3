"""Models with random weights for benchmarks, and the texts that models are given."""

import dataclasses

import pytest
import torch

from lckv.policies.dense.config import DenseConfig
from lckv.policies.dmc.config import DMCConfig
from lckv_megatron.measuring.measures import Prefill
from lckv_megatron.measuring.subjects import Subject, load_folder, random_tokens, text_tokens
from megatron_ext.errors import ConfigError
from tests.lckv.models.folders import save_folder
from tools.benchmarks.generation.models import RandomModel, Sizes

SIZES = Sizes(layers=6, hidden_size=64, heads=4, kv_heads=2, vocab_size=128, sliding_window=16, context=256)
CPU = torch.device("cpu")
PLAIN_MERGING, LCKV_MERGING = (
    f"{layout},dmc:stage=finetune:target_compression_ratio=4" for layout in ("plain", "lckv")
)


def merging(ratio: float) -> DMCConfig:
    return DMCConfig(stage="finetune", target_compression_ratio=ratio)


def build(text: str, sizes: Sizes = SIZES) -> Subject:
    wanted = RandomModel.parse(text)
    model = wanted.build(sizes, dtype=torch.float32, device=CPU)
    return Subject(wanted.name, model, random_tokens(sizes.vocab_size, 2, sizes.context))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lckv", RandomModel("lckv", "lckv", DenseConfig())),
        ("mine=0_0_2_2", RandomModel("mine", "0_0_2_2", DenseConfig())),
        (PLAIN_MERGING, RandomModel("plain", "plain", merging(4.0))),
        ("both=lckv,dmc:window=null", RandomModel("both", "lckv", DMCConfig(window=None))),
    ],
)
def test_what_is_asked_for(text: str, expected: RandomModel) -> None:
    assert RandomModel.parse(text) == expected


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (
            "dmc:target_compression_ratio=0.5",
            r"policy\.target_compression_ratio is 0\.5; it must be at least 1",
        ),
        ("dmc:ratio=2", r"policy\.ratio is unknown"),
        ("dmc:window", r"policy\.window is ''; it must be"),
        ("tova", r"policy\.name is 'tova'; it must be one of dense, dmc"),
        ("", r"policy\.name is ''; it must be one of"),
    ],
)
def test_what_cannot_be_asked_for(option: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RandomModel.parse(f"plain,{option}")


@pytest.mark.parametrize(
    ("text", "layer_types", "window"),
    [
        ("plain", "0_1_2_3_4_5", None),
        ("YOCO", "0s_1s_2s_3_3_3", 16),
        ("mine=0_0_2_2_4_4", "0_0_2_2_4_4", None),
    ],
)
def test_maps(text: str, layer_types: str, window: int | None) -> None:
    compression = build(text).model.config.compression_config()
    assert (compression.layer_types, compression.sliding_window) == (layer_types, window)


def test_a_map_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"--random mine: compression\.layer_types"):
        build("mine=0_0")


@pytest.mark.parametrize("ratio", [2, 4])
@pytest.mark.parametrize("layout", ["plain", "lckv"])
def test_scripted_decisions_merge_as_many_tokens_as_asked_for(layout: str, ratio: int) -> None:
    text = f"{layout},dmc:stage=finetune:target_compression_ratio={ratio}"
    prefill = Prefill(build(text), 256, 0.0)
    prefill()
    assert prefill.compression_ratio == pytest.approx(ratio, rel=0.1)


def test_scripted_decisions_drop_as_many_tokens_as_asked_for() -> None:
    text = "cla=0_0_2_2_4_4,dms:stage=finetune:target_compression_ratio=4:window=1"
    prefill = Prefill(build(text), 256, 0.0)
    prefill()
    assert prefill.compression_ratio == pytest.approx(4, rel=0.1)


def test_a_model_is_always_the_same() -> None:
    first, second = (build(LCKV_MERGING).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prompts_are_cut_from_texts_one_after_the_other() -> None:
    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    texts = iter(["abc", "defg", "never read"])
    assert text_tokens(texts, encode, 2, 3).tolist() == [encode("abc"), encode("def")]
    assert list(texts) == ["never read"]
    with pytest.raises(
        ConfigError,
        match="--text has 7 tokens, but 2 prompts of 4 are measured; give more text, or smaller --lengths",
    ):
        text_tokens(["abc", "defg"], encode, 2, 4)


def test_folders_that_cannot_be_loaded(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json does not exist"):
        load_folder(tmp_path / "none", dtype=None, device=CPU)
    save_folder(tmp_path / "cut")
    (weights,) = (tmp_path / "cut").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match=r"model.safetensors is truncated"):
        load_folder(tmp_path / "cut", dtype=None, device=CPU)


def test_sizes_of_the_model() -> None:
    config = build("plain", dataclasses.replace(SIZES, hidden_size=96)).model.config
    assert (config.hidden_size, config.intermediate_size, config.head_dim, config.num_key_value_heads) == (
        96,
        256,
        24,
        2,
    )
