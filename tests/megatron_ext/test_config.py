"""The configuration's dataclasses: derived values, documentation, immutability."""

import dataclasses
import typing

import docstring_parser
import pytest

from megatron_ext.config import ModelConfig, RunConfig
from megatron_ext.settings import variants_of


def sections(section=RunConfig, prefix=""):
    hints = typing.get_type_hints(section)
    for entry in dataclasses.fields(section):
        hint = hints[entry.name]
        for part in [hint] if dataclasses.is_dataclass(hint) else variants_of(entry).values():
            yield prefix + entry.name, part
            yield from sections(part, f"{prefix}{entry.name}.")


@pytest.mark.parametrize(
    ("name", "section"), list(sections()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_field_is_documented_and_frozen(name, section):
    described = {
        entry.arg_name: entry.description for entry in docstring_parser.parse_from_object(section).params
    }
    for field in dataclasses.fields(section):
        if not dataclasses.is_dataclass(typing.get_type_hints(section)[field.name]):
            assert described.get(field.name), f"{name}.{field.name} has no docstring"
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(section(), dataclasses.fields(section)[0].name, None)


def test_a_run_can_be_a_dictionary_key():
    assert len({RunConfig(), RunConfig()}) == 1


def test_derived_sizes():
    model = ModelConfig(hidden_size=96, num_attention_heads=6)
    assert (model.head_dim, model.query_groups, model.ffn_size) == (16, 6, 256)
    given = ModelConfig(
        hidden_size=96, num_attention_heads=6, num_query_groups=2, kv_channels=32, ffn_hidden_size=100
    )
    assert (given.head_dim, given.query_groups, given.ffn_size) == (32, 2, 100)


@pytest.mark.parametrize("hidden_size", [24, 64, 100, 4096])
def test_default_mlp_width_is_the_next_multiple_of_64_above_8_thirds(hidden_size):
    size = ModelConfig(hidden_size=hidden_size).ffn_size
    assert size % 64 == 0
    assert 0 <= size - hidden_size * 8 / 3 < 64
