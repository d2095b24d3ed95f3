import re
from pathlib import Path

import pytest
from hypothesis import given

from lckv.sharing.doubts import doubts
from lckv.sharing.layer_types import LayerTypes
from lckv.sharing.plan import layer_groups
from tests.lckv.sharing.maps import maps

ROOT = Path(__file__).resolve().parents[3]
PUBLISHED = [
    "0_0_2_2_4_4_6_6",  # CLA
    "0s_1s_2s_3s_4_4_4_4",  # YOCO
    "0_6_6_6_6_6_6_7",  # LCKV
    "8_8_8_8_8_8_8_8_8",  # the same without warm-up layers
    "0_1_5_5_5_5_6_7",  # sandwich-middle
    "0_1_2_3_7_7_7_7",  # pizza-top
    "0_1_2_2_2_2_6_7",  # sandwich-bottom
    "0_3_3_3_6_6_6_7",  # lasagna-top
    "0_2_2_5_5_5_8_8_8_9",  # lasagna-middle and -top mixed
    "0_2_2_2_5_5_5_8_8_8",
]


def parse(text: str) -> LayerTypes:
    return LayerTypes.parse(text, len(text.split("_")))


@pytest.mark.parametrize("text", PUBLISHED)
def test_published_maps_leave_no_doubt(text: str) -> None:
    assert list(doubts(parse(text))) == []


def test_maps_of_the_documentation_leave_no_doubt() -> None:
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.yaml"), ROOT / "README.md"]
    entry = r"\d+(?:\+\d+)?s?"
    texts = {
        text for page in pages for text in re.findall(rf"\b{entry}(?:_{entry}){{3,}}\b", page.read_text())
    }
    legal = [
        text for text in texts if max(int(number) for number in re.findall(r"\d+", text)) <= text.count("_")
    ]
    assert len(legal) > 5
    assert [text for text in legal if list(doubts(parse(text)))] == []


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("0_6_6_6_5_6_6_7", "read more than one layer above themselves (5, 6); layer 4 reads layer 5, which"),
        (
            "0_6_6_6_6_6_7_7",
            "1 to 7 of .* (6, 7); layers 1, 2, 3, 4, 5 read layer 6, which itself reads layer 7",
        ),
        ("0_6_6_2_6_6_6_7", "1 to 6 of .* layer 3 reads layer 2, which itself reads layer 6"),
        ("0_7_6_6_6_6_6_7", "1 to 7 of .* (6, 7)."),
        ("0_3_3_4_6_6_6_7", "1 to 6 of .* (3, 4, 6); layers 1, 2 read layer 3, which itself reads layer 4; "),
        ("0_3_6_3_6_6_6_7", "1 to 6 of .* (3, 6)."),
        ("0_5_5_5_5_5_3_7", "layer 6 reads layer 3, which itself reads layer 5"),
        ("0_5_5_5_5_5_4_7", "layer 6 reads layer 4, which itself reads layer 5"),
    ],
)
def test_one_wrong_digit(text: str, reasons: str) -> None:
    said = " ".join(doubts(parse(text)))
    pattern = re.escape(reasons).replace(r"\.\*", ".*")
    assert re.search(pattern, said), said
    assert said.endswith("let all of them read one layer, and that its own keys and values.")


@given(maps())
def test_what_is_cheap_enough_leaves_no_doubt(layer_types: LayerTypes) -> None:
    """Without cycles there is nothing to say; a sentence names layers that are iterated."""
    iterated = [group for group in layer_groups(layer_types) if group.iterated]
    sentences = list(doubts(layer_types))
    assert len(sentences) <= len(iterated)
    for sentence in sentences:
        assert any(f"layers {group.start} to {group.stop - 1} of" in sentence for group in iterated)
