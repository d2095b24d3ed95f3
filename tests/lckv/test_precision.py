"""Numbers by their names."""

import subprocess
import sys

import pytest

from lckv.errors import UnsupportedError
from lckv.precision import DTYPE_NAMES, bytes_of, name_of, torch_dtype


@pytest.mark.parametrize("name", DTYPE_NAMES)
def test_names_sizes_and_dtypes_agree(name: str) -> None:
    dtype = torch_dtype(name)
    assert dtype.itemsize == bytes_of(name)
    assert name_of(dtype) == name


@pytest.mark.parametrize("ask", [bytes_of, torch_dtype])
def test_unknown_numbers(ask) -> None:
    with pytest.raises(UnsupportedError, match="int8 cannot be used: numbers are float32, bfloat16, float16"):
        ask("int8")


def test_sizes_need_no_torch() -> None:
    program = "import sys; from megatron_ext.precision import precision; precision('bf16').bytes; "
    program += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
