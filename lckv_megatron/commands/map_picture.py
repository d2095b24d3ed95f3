"""Draws sharing maps as a picture.

    lckv-megatron map-picture 0_6_6_6_6_6_6_7 --output docs/images/lckv.png
    lckv-megatron map-picture "CLA: 0_0_2_2" "YOCO: 0s_1s_2_2" --output docs/images/sharing_maps.png

Each argument is a map as in compression.layer_types, with an optional title before it. Layers stand bottom to
top. A filled box computes keys and values; a line runs from every layer that reads another's to the layer
that it reads.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.arguments import ProgramParser

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    parser = ProgramParser("map-picture", __doc__)
    parser.add_argument("maps", nargs="+", metavar="MAP", help='0_0_2_2, or "TITLE: 0_0_2_2"')
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("maps.png"), help="PNG to write (default: %(default)s)"
    )
    parser.add_argument(
        "--passes",
        default="m + b",
        help='how often iterated layers run, such as "7 + 2" (default: %(default)s)',
    )
    options = parser.parse_args(argv)
    from lckv_megatron.pictures.files import write_picture  # with matplotlib: --help does not wait for it
    from lckv_megatron.pictures.sharing_maps import FONT

    try:
        write_picture(lambda: _picture(options), FONT, options.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.output)
    return 0


def _picture(options: argparse.Namespace) -> "Figure":
    """The maps that were asked for; the folder of the file is made."""
    from lckv_megatron.pictures.sharing_maps import draw, parse

    maps = [parse(text) for text in options.maps]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    return draw(maps, passes=options.passes)


if __name__ == "__main__":
    sys.exit(main())
