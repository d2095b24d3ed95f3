"""The check for a GPU, at tiny size on a CPU: every part works, and is not broken when there is a GPU."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.pages.stand_ins import stand_ins
from tools.gpu_check.__main__ import main
from tools.gpu_check.commands import CommandError, Commands
from tools.gpu_check.inputs import layer_types
from tools.gpu_check.parts import PARTS


@pytest.fixture
def _warm_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A dozen programs start, each of which would import Megatron anew."""
    with stand_ins(tmp_path / "programs", hub=tmp_path / "hub"):
        monkeypatch.setattr(sys, "executable", str(tmp_path / "programs" / "bin" / "python"))
        yield


@pytest.mark.slow
@pytest.mark.nightly  # its commands are those of the pages, which run every time
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("_warm_programs")
def test_every_part_runs(tmp_path: Path) -> None:
    status = main(["--tiny", "--minutes", "14", "--output", str(tmp_path / "check.json")])
    result = json.loads((tmp_path / "check.json").read_text(encoding="utf-8"))
    assert {part["name"]: part["error"] for part in result["parts"]} == {
        part.__name__: None for part in PARTS
    }
    assert status == 0
    figures = {part["name"]: part["figures"] for part in result["parts"]}
    assert len(figures["training"]["lckv"]["losses"]) == 6
    assert figures["recipe"]["iteration_seconds"] > 0
    assert result["versions"]["torch"]


def test_what_fails_is_told_and_the_rest_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    output = str(tmp_path / "check.json")
    status = main(["--tiny", "--output", output, "--parts", "doctor", "synchronisations"])  # without a corpus
    first, second = json.loads(Path(output).read_text(encoding="utf-8"))["parts"]
    assert status == 1
    assert (first["passed"], second["passed"]) == (True, False)
    assert "lckv.yaml" in second["error"]


def test_commands_end_with_the_time_of_the_check() -> None:
    with pytest.raises(CommandError, match="not done after 1 s: begun"):
        Commands(1.0).python("-c", "import time; print('begun', flush=True); time.sleep(60)")
    with pytest.raises(CommandError, match="not reached: the time of the check is over"):
        Commands(0.0).python("-c", "")
    with pytest.raises(CommandError, match="exit status 3: said"):
        Commands(60.0).python("-c", "import sys; print('said'); sys.exit(3)")


def test_maps_fit_any_depth() -> None:
    assert layer_types("lckv", 6) == "0_4_4_4_4_5"
    assert layer_types("yoco", 6) == "0s_1s_2s_3_3_3"
    assert layer_types("plain", 3) == "0_1_2"
