"""The typed reader of JSON content: what it makes, and every message."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from lckv.config import CompressionConfig
from lckv.errors import ModelError
from lckv.policies.dmc.config import DMCConfig
from lckv.reading import read


@dataclass(frozen=True)
class Small:
    """Fields."""

    name: Literal["small"] = "small"
    size: int = 1


@dataclass(frozen=True)
class Large:
    """Other fields."""

    name: Literal["large"] = "large"
    size: float = 2.0


@dataclass(frozen=True)
class Whole:
    """Every kind of field."""

    count: int
    share: float | None = None
    text: str = ""
    on: bool = False
    kind: Literal["a", "b"] = "a"
    words: tuple[str, ...] = ()
    inner: Small = field(default_factory=Small)
    choice: Small | Large = field(
        default_factory=Small, metadata={"variants": lambda: {"small": Small, "large": Large}}
    )


def test_every_kind_of_field() -> None:
    content = {"count": 3, "share": 1, "text": "x", "on": True, "kind": "b", "words": ["u", "v"]}
    content |= {"inner": {"size": 5}, "choice": {"name": "large", "size": 7}}
    whole = read(Whole, content)
    assert whole == Whole(3, 1.0, "x", True, "b", ("u", "v"), Small(size=5), Large(size=7.0))
    assert isinstance(whole.share, float) and isinstance(whole.choice.size, float)
    assert read(Whole, json.loads(json.dumps(asdict(whole)))) == whole
    assert read(Whole, {"count": 1}) == Whole(1)
    assert read(Whole, {"count": 1, "choice": None, "share": None}) == Whole(1)
    assert read(Whole, {"count": 1, "choice": Large(), "inner": Small(size=2)}) == Whole(
        1, inner=Small(size=2), choice=Large()
    )
    assert read(Whole, whole) is whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": True}, "w.count is True; it must be an integer."),
        ({"count": 2.0}, "w.count is 2.0; it must be an integer."),
        ({"count": None}, "w.count is None; it must be an integer."),
        ({"share": "1"}, "w.share is '1'; it must be a number or null."),
        ({"share": False}, "w.share is False; it must be a number or null."),
        ({"text": 3}, "w.text is 3; it must be a text."),
        ({"on": 1}, "w.on is 1; it must be true or false."),
        ({"kind": "c"}, "w.kind is 'c'; it must be one of a, b."),
        ({"words": "u"}, "w.words is 'u'; it must be a list."),
        ({"words": [1]}, "w.words is [1]; it must be a list."),
        ({"inner": 3}, "w.inner is 3; it must be an object with the fields name, size."),
        ({"inner": {"size": "x"}}, "w.inner.size is 'x'; it must be an integer."),
        ({"choice": 3}, "w.choice is 3; it must be an object with a name, one of small, large."),
        ({"choice": {"size": 3}}, "w.choice.name is None; it must be one of small, large."),
        ({"choice": {"name": ["small"]}}, "w.choice.name is ['small']; it must be one of small, large."),
        ({"choice": {"name": "large", "sise": 3}}, "w.choice.sise is unknown; did you mean w.choice.size?"),
        ({"cuont": 3}, "w.cuont is unknown; did you mean w.count?"),
        ({"zzz": 3}, "w.zzz is unknown; the fields are count, share, text, on, kind, words, inner, choice."),
    ],
)
def test_messages(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(Whole, {"count": 1} | change, "w")
    assert str(caught.value) == message


def test_content_that_is_no_object_and_all_problems_at_once() -> None:
    with pytest.raises(ModelError, match="the content is 3; it must be an object with the fields count, "):
        read(Whole, 3)
    with pytest.raises(ModelError) as caught:
        read(Whole, {"on": 2, "text": 1, "other": 0})
    assert [line.split(" is ")[0] for line in str(caught.value).splitlines()] == [
        "on",
        "text",
        "other",
        "count",
    ]


def test_compression() -> None:
    compression = CompressionConfig("0_0", 3, 1, policy=DMCConfig(stage="finetune", window=None, eps=1e-3))
    assert CompressionConfig.from_dict(json.loads(json.dumps(asdict(compression)))) == compression
    assert CompressionConfig.from_dict({}) == CompressionConfig()
    assert CompressionConfig.from_dict({"policy": DMCConfig()}) == CompressionConfig(policy=DMCConfig())
    with pytest.raises(ModelError, match=r"compression\.policy\.window is 2\.5; it must be an integer"):
        CompressionConfig.from_dict({"policy": {"name": "dmc", "window": 2.5}})
