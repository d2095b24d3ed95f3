"""Numbers by their names."""

import os
import subprocess
import sys

import pytest
import torch

from lckv.errors import UnsupportedError
from lckv.precision import DTYPE_NAMES, bytes_of, exact_products, name_of, torch_dtype


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


def test_float32_products_are_float32_where_a_container_asks_for_tf32() -> None:
    program = (
        "import torch; from lckv.precision import exact_products; told = torch.get_float32_matmul_precision\n"
    )
    program += "before = told()\nwith exact_products(): within = told()\nprint(before, within, told())"
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert said.stdout.split() == ["high", "highest", "high"]


def test_the_setting_comes_back_after_an_error() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(KeyError), exact_products():
            raise KeyError
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
