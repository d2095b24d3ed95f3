"""Settings of configurations in which a field is one of several dataclasses, told apart by a name."""

from dataclasses import asdict, dataclass, field, fields
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import ConfigError
from megatron_ext.settings import describe_settings, read, settings_of, variants_of


@dataclass(frozen=True)
class Depth:
    """How deep."""

    metres: float = 1.0
    """Below the ground."""


@dataclass(frozen=True)
class Stone:
    """Lies there."""

    name: Literal["stone"] = "stone"
    """Which kind."""


@dataclass(frozen=True)
class Tree:
    """Grows and grows,
    100 % of the time.

    Further text is not shown.
    """

    name: Literal["tree"] = "tree"
    """Which kind."""

    age: int | None = 5
    """In years; null: unknown."""

    height: float = 2.5
    """In metres."""

    roots: Depth = field(default_factory=Depth)
    """Where it drinks."""


@dataclass(frozen=True)
class Cat:
    """Sleeps."""

    name: Literal["cat"] = "cat"
    """Which kind."""

    age: str = "young"
    """In words."""

    toys: tuple[str, ...] = ()
    """What it plays with."""


@dataclass(frozen=True)
class Garden:
    """A garden."""

    thing: object = field(
        default_factory=Stone, metadata={"variants": lambda: {"stone": Stone, "tree": Tree, "cat": Cat}}
    )
    """What is in the middle."""

    other: Tree | Cat = field(default_factory=Cat, metadata={"variants": lambda: {"tree": Tree, "cat": Cat}})
    """What is in the corner."""

    size: int = 3
    """In square metres."""


IN_DESERTS: dict[str, type] = {"stone": Stone}


@dataclass(frozen=True)
class Desert:
    """A desert."""

    thing: object = field(default_factory=Stone, metadata={"variants": lambda: IN_DESERTS})
    """What is in the middle."""


def refusal(*sources):
    with pytest.raises(ConfigError) as raised:
        read(Garden, [(f"{number}: ", tree) for number, tree in enumerate(sources)])
    return str(raised.value)


def garden(*sources):
    return read(Garden, [("", tree) for tree in sources])


def test_only_fields_that_say_so_have_variants():
    variants = {entry.name: list(variants_of(entry)) for entry in (*fields(Garden), *fields(Tree))}
    assert variants.pop("thing") == ["stone", "tree", "cat"]
    assert variants.pop("other") == ["tree", "cat"]
    assert not any(variants.values())


def test_variants_are_asked_for_each_time():
    assert "thing.height" not in settings_of(Desert)
    IN_DESERTS["tree"] = Tree
    assert "thing.height" in settings_of(Desert)
    assert read(Desert, [("", {"thing": {"name": "tree"}})]).thing == Tree()


def test_defaults():
    assert garden() == Garden()
    assert garden({"thing": None}, None, {}) == Garden()


def test_a_name_chooses_and_the_other_settings_are_read_as_its_own():
    assert garden({"thing": {"name": "tree", "age": "7"}}).thing == Tree(age=7)
    assert garden({"thing": {"name": "cat", "age": "7"}}).thing == Cat(age="7")
    assert garden({"thing.name": "tree", "thing.roots.metres": "3"}).thing == Tree(roots=Depth(3.0))
    assert garden({"thing.name": "tree", "thing.age": None}).thing == Tree(age=None)
    assert garden({"other": {"toys": "[a, b]"}}).other == Cat(toys=("a", "b"))


def test_the_last_source_chooses_wherever_the_others_stand():
    assert garden({"thing": {"age": "7"}}, {"thing": {"name": "tree"}}).thing == Tree(age=7)
    assert garden({"thing": {"name": "cat", "age": "7"}}, {"thing.name": "tree"}).thing == Tree(age=7)


def test_settings_of_variants_that_are_not_chosen():
    assert refusal({"thing": {"name": "stone"}}, {"thing": {"age": 1, "height": 2}}).splitlines() == [
        (
            "1: thing.age belongs to thing tree or cat; thing.name is stone: remove the former, or set the "
            "latter to tree or cat."
        ),
        (
            "1: thing.height belongs to thing tree; thing.name is stone: remove the former, or set the "
            "latter to tree."
        ),
    ]
    assert refusal({"other": {"roots": {"metres": 2}}}).startswith(
        "0: other.roots.metres belongs to other tree;"
    )


def test_an_unknown_name_is_the_only_thing_said_about_a_variant():
    assert refusal({"thing": {"name": "house", "age": "old"}}) == (
        "0: thing.name is 'house'; it must be one of stone, tree, cat."
    )
    assert (
        refusal({"thing": {"name": ["tree"]}})
        == "0: thing.name is ['tree']; it must be one of stone, tree, cat."
    )
    assert refusal({"thing": {"name": "tre"}}).endswith("one of stone, tree, cat; did you mean tree?")


def test_values_of_the_wrong_type_and_unknown_keys():
    assert (
        refusal({"thing": {"name": "tree", "age": "old"}})
        == "0: thing.age is 'old'; it must be an integer or null."
    )
    assert refusal({"thing": {"hight": 1}}) == "0: thing.hight is unknown; did you mean thing.height?"
    assert refusal({"thing": 5}) == "0: thing is 5; it must be a mapping of names to values."
    assert refusal(5) == "0: the configuration is 5; it must be a mapping of names to values."


def test_a_key_has_one_setting_for_each_variant_that_has_it():
    known = settings_of(Garden)
    assert [setting.needs for setting in known["thing.age"]] == [
        ("thing.name", "tree"),
        ("thing.name", "cat"),
    ]
    assert [setting.default for setting in known["other.name"]] == ["cat"]
    assert "thing" not in known and "thing.roots" not in known


def test_help_groups_settings_by_variant():
    shown = " ".join(describe_settings(Garden).split())
    assert (
        "thing: What is in the middle: --thing.name {stone,tree,cat} stone: Lies there. tree: Grows and "
        "grows, " in shown
    )
    assert "100 % of the time. cat: Sleeps." in shown and "Further" not in shown
    assert "thing tree: --thing.age AGE In years; null: unknown. (type: int | null, default: 5)" in shown
    assert "thing.roots: How deep: --thing.roots.metres METRES Below the ground." in shown
    assert "thing cat: --thing.age AGE In words. (type: str, default: young)" in shown
    assert "--thing.toys TEXT|[TEXT,...] What it plays with." in shown


trees = st.builds(
    Tree,
    age=st.none() | st.integers(),
    height=st.floats(allow_nan=False),
    roots=st.builds(Depth, metres=st.floats(allow_nan=False)),
)
cats = st.builds(Cat, age=st.text(), toys=st.lists(st.text()).map(tuple))


@given(st.builds(Garden, thing=st.just(Stone()) | trees | cats, other=trees | cats, size=st.integers()))
def test_what_dictionaries_say_is_read_back(made):
    assert garden(asdict(made)) == made
