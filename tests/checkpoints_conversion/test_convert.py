"""Whole conversions: what they write, prove and refuse, and that nothing is left of those that fail."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_conversion import convert
from checkpoints_conversion.conversion_record import RECORD_NAME, read_record
from checkpoints_conversion.convert import hf_to_megatron, legacy_to_megatron, megatron_to_hf
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats.megatron import MegatronCheckpoint, write_checkpoint
from checkpoints_conversion.megatron_logits import write_logits
from checkpoints_conversion.places import NO_TOKENIZER
from checkpoints_conversion.verify import ProofError
from lckv.errors import ModelError
from lckv.weights.tensors import MemorySource, TensorSource
from megatron_ext.errors import ConfigError
from tests.checkpoints_conversion.formats.checkpoints import whole_weights
from tests.checkpoints_conversion.formats.test_megatron_legacy import POLICY, PUBLISHED, publish
from tests.lckv.families.tiny_models import saved_model
from tests.lckv.tokenizer_json import write_tokenizer_json
from tests.megatron_ext.model.stages import VOCAB
from tests.megatron_ext.training.runs import tiny_run, train
from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _megatron_in_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are there already compute Megatron's logits, instead of new processes."""

    def compute(*arguments: Any, layer_types: str | None, timeout_seconds: float) -> None:
        parallel = arguments[3]
        ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        run_on_ranks(ranks, write_logits, *arguments, layer_types, timeout=timeout_seconds)

    monkeypatch.setattr("checkpoints_conversion.verify.compute", compute)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    saved_model(folder, "llama")
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """The model, to be damaged."""
    shutil.copytree(llama, tmp_path / "source")
    return tmp_path / "source"


def assert_nothing_is_left(folder: Path, *kept: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


def test_a_conversion_ends_with_a_proof(
    llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    hf_to_megatron(str(llama), tmp_path / "megatron")
    assert "result              equal" in caplog.text
    assert "top-1 agreement     100.000 %" in caplog.text
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert caplog.text.count("result              equal") == 2
    assert_nothing_is_left(tmp_path, "megatron", "back")


def test_what_was_done_is_written_beside_the_weights(llama: Path, tmp_path: Path) -> None:
    target = tmp_path / "megatron"
    changes = {"compression.layer_types": "0_2_2"}
    description = hf_to_megatron(str(llama), target, changes=changes, how="copy", proof="never")
    record = read_record(target / "iter_0000000")
    assert record is not None
    assert record.description == description == MegatronCheckpoint(target).description
    assert record.initialization == "copy"
    assert record.source.path == str(llama)
    assert record.source.files.keys() == {WEIGHTS}
    megatron_to_hf(target, tmp_path / "back", proof="never")
    after = read_record(tmp_path / "back")
    assert after is not None
    assert after.previous == record.without_places()
    assert str(tmp_path) not in (tmp_path / "back" / RECORD_NAME).read_text()
    assert after.training is None
    assert all(name.endswith(".distcp") for name in after.source.files)


@pytest.mark.parametrize(
    "changes",
    [
        {"compression.layer_types": "0_2_2"},
        {"compression.policy.name": "dmc", "compression.policy.target_compression_ratio": 4},
        {"compression.layer_types": "0s_1_1", "compression.sliding_window": "4"},
    ],
    ids=["map", "dmc", "window"],
)
def test_what_a_conversion_changes_is_proven_too(
    changes: dict[str, object], llama: Path, tmp_path: Path
) -> None:
    description = hf_to_megatron(str(llama), tmp_path / "megatron", changes=changes, proof="always")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", proof="always")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "lckv-llama"
    if "compression.policy.name" in changes:
        assert description.compression.policy.stage == "zero_out"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes(dtype: torch.dtype, llama: Path, tmp_path: Path) -> None:
    """Weights that are rounded by a conversion are proven as rounded."""
    hf_to_megatron(str(llama), tmp_path / "megatron", dtype=dtype, proof="always")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", dtype=torch.bfloat16, proof="always")
    before, after = load_file(llama / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(after[name], before[name].bfloat16()) for name in before)
    if dtype == torch.bfloat16:
        with pytest.raises(ProofError):  # what bfloat16 has lost does not come back
            prove_as_float32(llama, tmp_path / "megatron")


def prove_as_float32(original: Path, megatron: Path) -> None:
    """As if the checkpoint had float32 weights."""
    opened = convert.open_megatron(megatron)
    opened = replace(opened, description=replace(opened.description, dtype=torch.float32))
    convert.prove(convert.open_huggingface(original), opened)


def test_half_precision(llama: Path, copy: Path, tmp_path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(llama / WEIGHTS).items()}, copy / WEIGHTS)
    assert hf_to_megatron(str(copy), tmp_path / "megatron", proof="always").dtype == torch.float16
    hf_to_megatron(str(copy), tmp_path / "bfloat16", dtype=torch.bfloat16, proof="always")


def test_a_model_too_large_for_a_proof(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr("checkpoints_conversion.verify.LARGEST_AUTOMATIC_PROOF", 1000)
    hf_to_megatron(str(llama), tmp_path / "megatron")
    command = f"verify --layers-at-once 2 --hf-path {llama} --megatron-path {tmp_path / 'megatron'}"
    assert command in caplog.text
    assert "nothing of it is proven" in caplog.text
    assert "result" not in caplog.text


def _swap_heads(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rows of queries, keys and values in blocks instead of interleaved by key/value head."""
    if not name.endswith("linear_qkv.weight"):
        return tensor
    heads = tensor.unflatten(0, (2, 4, -1))
    return torch.cat([heads[:, :2].flatten(0, 2), heads[:, 2].flatten(0, 1), heads[:, 3].flatten(0, 1)])


def _swap_gate(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(len(tensor) // 2, 0) if name.endswith("linear_fc1.weight") else tensor


def _shift_vocabulary(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, 0) if name == "output_layer.weight" else tensor


def test_some_layers_of_a_large_model_are_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In both directions, and a damaged one is noticed."""
    caplog.set_level("INFO")
    saved_model(tmp_path / "hf", "llama", num_hidden_layers=8)
    monkeypatch.setattr("checkpoints_conversion.verify.LARGEST_AUTOMATIC_PROOF", 60_000)
    hf_to_megatron(
        str(tmp_path / "hf"), tmp_path / "megatron", changes={"compression.layer_types": "0_6_6_6_6_6_6_7"}
    )
    assert "5 of its 8 layers are proven" in caplog.text
    assert "of the layers 0, 2, 5, 6, 7 alone" in caplog.text
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert caplog.text.count("of the layers 0, 2, 5, 6, 7 alone") == 2

    def write_wrongly(folder: Path, description: Any, source: TensorSource, **options: Any) -> Path:
        tensors = {name: _swap_gate(name, source.read(name)) for name in source.infos()}
        return write_checkpoint(folder, description, MemorySource(tensors), **options)

    monkeypatch.setattr(convert, "write_checkpoint", write_wrongly)
    with pytest.raises(ProofError):
        hf_to_megatron(str(tmp_path / "hf"), tmp_path / "damaged")


@pytest.mark.parametrize(
    ("damage", "model"),
    [
        (_swap_heads, {}),
        (_swap_gate, {}),
        (_shift_vocabulary, {}),
        (None, {"rotary_base": 10000.0}),
        (None, {"layernorm_epsilon": 1e-3}),
    ],
    ids=["heads", "gate", "vocabulary", "RoPE base", "epsilon"],
)
def test_a_wrong_conversion_is_found_and_not_published(
    damage: Callable[[str, torch.Tensor], torch.Tensor] | None,
    model: dict[str, Any],
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The faults that users of converters report."""

    def write_wrongly(folder: Path, description: Any, source: TensorSource, **options: Any) -> Path:
        tensors = {name: source.read(name) for name in source.infos()}
        if damage is not None:
            tensors = {name: damage(name, tensor) for name, tensor in tensors.items()}
        wrong = replace(description, model=replace(description.model, **model))
        return write_checkpoint(folder, wrong, MemorySource(tensors), **options)

    monkeypatch.setattr(convert, "write_checkpoint", write_wrongly)
    # Settings that differ are named before anything is computed: here the proof shall find them.
    monkeypatch.setattr("checkpoints_conversion.reference.differences", lambda first, second: {})
    with pytest.raises(ProofError, match="does not compute what the original does; nothing was written"):
        hf_to_megatron(str(llama), tmp_path / "megatron")
    assert_nothing_is_left(tmp_path)


def test_the_folder_is_looked_at_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    for function in (hf_to_megatron, megatron_to_hf):
        with pytest.raises(ConversionError, match="is not empty; a conversion writes a new folder"):
            function("nowhere" if function is hf_to_megatron else Path("nowhere"), tmp_path)


def _truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def _with(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return damage


def _pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _config(**changed: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return damage


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_truncated, "model.safetensors"),
        (_with(lambda tensors: tensors.pop(NAME)), f"1 missing: {NAME}"),
        (_with(lambda tensors: tensors.update(extra=torch.zeros(2))), "1 not part of the model: extra"),
        (_with(lambda tensors: tensors.update({NAME: torch.zeros(2, 2)})), rf"{NAME} \[2, 2\] instead of"),
        (
            _with(lambda tensors: tensors[NAME][3, 1].fill_(np.nan)),
            f"{NAME} contains 1 of .* NaN or infinite",
        ),
        (_pickled, "only pickled weights"),
        (_config(attention_multiplier=2.0), "attention_multiplier is 2.0"),
        (_config(model_type="gpt_neox"), "model_type is 'gpt_neox'"),
    ],
    ids=["truncated", "missing", "extra", "shape", "nan", "pickle", "field", "family"],
)
def test_a_bad_source(damage: Callable[[Path], None], said: str, copy: Path, tmp_path: Path) -> None:
    damage(copy)
    with pytest.raises(ModelError, match=said):
        hf_to_megatron(str(copy), tmp_path / "megatron")
    assert_nothing_is_left(tmp_path, "source")


def test_pickles_are_read_where_they_are_allowed(copy: Path, tmp_path: Path) -> None:
    _pickled(copy)
    hf_to_megatron(str(copy), tmp_path / "megatron", allow_pickle=True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"compression.layer_types": "0_1_2_2"}, "it has 4 entries but the model has 3 layers"),
        (
            {"compression.layer_types": "0s_1_2"},
            "compression.layer_types is 0s_1_2; .* sliding_window is not set",
        ),
        ({"compression.policy.stage": "zero_out"}, "compression.policy.stage belongs to policy dmc"),
        (
            {"compression.policy.name": "dmc", "compression.policy.stage": "retrofit"},
            "train that stage first",
        ),
        (
            {"compression.forward_passes": "many"},
            "compression.forward_passes is 'many'; it must be an integer",
        ),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, object], said: str, llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        hf_to_megatron(str(llama), tmp_path / "megatron", changes=changes)
    assert_nothing_is_left(tmp_path)


def test_a_damaged_checkpoint(llama: Path, tmp_path: Path) -> None:
    hf_to_megatron(str(llama), tmp_path / "megatron", proof="never")
    (weights,) = (tmp_path / "megatron" / "iter_0000000").glob("*.distcp")
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ConfigError, match="sha256 differs"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert_nothing_is_left(tmp_path, "megatron")


def test_a_family_that_cannot_express_the_model(llama: Path, tmp_path: Path) -> None:
    hf_to_megatron(
        str(llama), tmp_path / "megatron", changes={"compression.layer_types": "0_0_2"}, proof="never"
    )
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot express it"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", family="llama")
    assert_nothing_is_left(tmp_path, "megatron")


def test_a_plain_model_as_lckv_llama(llama: Path, tmp_path: Path) -> None:
    hf_to_megatron(str(llama), tmp_path / "megatron", proof="never")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", family="lckv-llama", proof="always")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "lckv-llama"


def test_a_tokenizer_that_is_not_there(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"--tokenizer nowhere does not exist"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", tokenizer=Path("nowhere"))


class _Stops:
    """Weights whose reading is interrupted."""

    def __init__(self, source: TensorSource) -> None:
        self._source, self._left = source, 5

    def infos(self) -> Any:
        return self._source.infos()

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return self._source.read(name, rows)


@pytest.mark.parametrize("to_hf", [False, True])
def test_an_interruption_in_the_middle_leaves_nothing(
    to_hf: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tmp_path / "checkpoint"
    hf_to_megatron(str(llama), checkpoint, proof="never")
    opener = "open_megatron" if to_hf else "open_huggingface"
    original = getattr(convert, opener)

    def opened(*arguments: Any, **options: Any) -> Any:
        model = original(*arguments, **options)
        return replace(model, source=_Stops(model.source))

    monkeypatch.setattr(convert, opener, opened)
    run = partial(megatron_to_hf, checkpoint) if to_hf else partial(hf_to_megatron, str(llama))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "target")
    assert_nothing_is_left(tmp_path, "checkpoint")


def test_a_signal_leaves_nothing(llama: Path, tmp_path: Path) -> None:
    """During the proof, whose process ends too."""
    command = [sys.executable, "-m", "checkpoints_conversion", "hf-to-megatron"]
    arguments = ["--hf-path", str(llama), "--megatron-path", str(tmp_path / "target")]
    process = subprocess.Popen([*command, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".target.converting/iter_*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in said
    assert_nothing_is_left(tmp_path)


def test_a_run_remembers_what_it_was_converted_from(tmp_path: Path) -> None:
    """Two runs later, special tokens and measurements are known to the export."""
    settings = {"vocab_size": 97, "num_hidden_layers": 4, "sliding_window": None, "eos_token_id": 7}
    saved_model(tmp_path / "source", "mistral", **settings)
    hf_to_megatron(str(tmp_path / "source"), tmp_path / "converted", proof="never")
    model = MegatronCheckpoint(tmp_path / "converted").settings["model"]
    for before, after in (("converted", "first"), ("first", "second")):
        checkpoint = {"load": str(tmp_path / before), "finetune": True, "save": str(tmp_path / after)}
        run = tiny_run(
            model=model,
            checkpoint=checkpoint,
            train={"train_iters": 2, "eval_interval": 2, "eval_iters": 1},
            optimizer={"lr_warmup_iters": 0},
            logging={"metrics_file": str(tmp_path / f"{after}.jsonl")},
        )
        run_on_ranks(1, train, run)
    description = megatron_to_hf(tmp_path / "second", tmp_path / "exported", proof="always")
    assert description.family == "mistral"
    assert description.token_ids["eos_token_id"] == 7
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["eos_token_id"] == 7
    record = read_record(tmp_path / "exported")
    assert record is not None
    assert record.training is not None
    assert record.training["progress"]["iteration"] == 2
    assert record.previous is not None
    assert record.previous.source.path == "source"
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "Trained for 2 iterations" in card
    assert "Validation loss" in card


def test_an_origin_that_was_moved(
    tmp_path: Path, llama: Path, copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its tokenizer is not silently left out; a copy, or doing without, is named. What its page said of the
    license is known."""
    write_tokenizer_json(copy / "tokenizer.json")
    (copy / "README.md").write_text("---\nlicense: mit\n---\n")
    (copy / "generation_config.json").write_text('{"temperature": 0.5}')
    hf_to_megatron(str(copy), tmp_path / "megatron", proof="never")

    def export(name: str, tokenizer: Path | None = None) -> str:
        megatron_to_hf(tmp_path / "megatron", tmp_path / name, tokenizer=tokenizer, proof="never")
        card = (tmp_path / name / "README.md").read_text()
        return f"{'license: mit' in card} {(tmp_path / name / 'tokenizer.json').exists()}"

    assert export("as_it_was") == "True True"
    assert export("named", copy / "tokenizer.json") == "True True"
    assert json.loads((tmp_path / "named" / "generation_config.json").read_text()) == {"temperature": 0.5}
    copy.rename(tmp_path / "moved")
    with pytest.raises(
        ConversionError, match=r"where there is none now\. Name a copy of it with --tokenizer"
    ):
        export("gone")
    assert export("found", tmp_path / "moved" / "tokenizer.json") == "True True"
    assert f"{copy}, from which the model comes, is not there any more" in caplog.text
    assert export("without", NO_TOKENIZER) == "True False"


def test_a_legacy_checkpoint(tmp_path: Path, llama: Path) -> None:
    publish(tmp_path / "dmc", tensor=2)
    shutil.copytree(llama, tmp_path / "tokenizer")
    target = tmp_path / "megatron"
    description = legacy_to_megatron(
        tmp_path / "dmc", target, vocab_size=VOCAB, tokenizer=tmp_path / "tokenizer", proof="always"
    )
    assert description.compression.policy == POLICY
    record = read_record(target / "iter_0000000")
    assert record is not None
    assert record.tokenizer == str(tmp_path / "tokenizer")
    files = {f"mp_rank_0{rank}/model_optim_rng.pt" for rank in range(2)}
    assert (record.source.format, record.source.files.keys()) == ("megatron-legacy", files)
    whole = MegatronCheckpoint(target)
    assert all(torch.equal(whole.read(name), tensor) for name, tensor in whole_weights(PUBLISHED).items())


def test_a_record_that_cannot_be_understood(llama: Path, copy: Path, tmp_path: Path) -> None:
    (copy / RECORD_NAME).write_text("{}")
    with pytest.raises(ConversionError, match="is no record of a conversion"):
        hf_to_megatron(str(copy), tmp_path / "megatron")
