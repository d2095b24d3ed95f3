"""`lckv-megatron faults`, from a checkout."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from lckv_megatron.__main__ import main

    sys.exit(main(["faults", *sys.argv[1:]]))
