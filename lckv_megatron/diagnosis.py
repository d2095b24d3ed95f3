"""What this machine has for training, which path each operation will take, and what is missing with the way
to get it."""

import importlib
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lckv.install import INSTALL_GPU

DISTRIBUTION = "lckv-megatron"
OPTIONAL = {
    "transformer-engine": ("transformer_engine.pytorch", "fused layers and fp32 main weights on GPU", "gpu"),
    "flash-attn": ("flash_attn", "flash attention on GPU", "gpu"),
    "liger-kernel": ("liger_kernel.ops", "RMSNorm, SwiGLU and the loss's softmax on GPU", "gpu"),
    "cut-cross-entropy": ("cut_cross_entropy", "model.cross_entropy_backend: cut", "gpu"),
    "triton": ("triton", "kernels on GPU; torch's CUDA builds bring it", "gpu"),
    "wandb": ("wandb", "logging.wandb_project", "wandb"),
    "lm-eval": ("lm_eval", "evaluation on common benchmarks", "eval"),
}
"""Distribution: the module to import, what it is good for, the extra of pyproject.toml that installs it."""
ENOUGH_OPEN_FILES = 4096
ENOUGH_SHARED_MEMORY_GIB = 1.0
ENOUGH_DISK_GIB = 10.0
GIB = 2**30


@dataclass(frozen=True)
class Missing:
    """Something that this machine lacks."""

    what: str
    remedy: str
    prevents_training: bool


@dataclass(frozen=True)
class OperationPath:
    """How an operation will be carried out, and why."""

    choice: str
    reason: str


@dataclass
class Report:
    """The result: facts by name, paths by operation, and what is missing."""

    facts: dict[str, str] = field(default_factory=dict)
    paths: dict[str, OperationPath] = field(default_factory=dict)
    missing: list[Missing] = field(default_factory=list)

    @property
    def can_train(self) -> bool:
        """Whether nothing that training needs is missing."""
        return not any(entry.prevents_training for entry in self.missing)

    def lacks(self, what: str, remedy: str, *, prevents_training: bool = False) -> None:
        """Note something missing."""
        self.missing.append(Missing(what, remedy, prevents_training))


def examine() -> Report:
    """Look at everything. A step that fails in an unforeseen way becomes an entry
    of its own; the others go on."""
    report = Report()
    for step in (_python, _requirements, _torch, _optional_packages, _index_builder, _machine, _paths):
        try:
            step(report)
        except Exception as error:  # noqa: BLE001 - told, whatever it is
            name = step.__name__.strip("_").replace("_", " ")
            remedy = "mend what the message names, or make a fresh environment: make clean setup"
            report.lacks(f"{name}: {type(error).__name__}: {error}", remedy, prevents_training=True)
    return report


def _python(report: Report) -> None:
    report.facts["python"] = f"{platform.python_version()} ({platform.platform()})"


def requirements() -> list[str]:
    """What the project needs always, such as "torch>=2.6":
    of the installed distribution, else of this checkout."""
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
        return [entry for entry in declared if "extra ==" not in entry]
    except importlib.metadata.PackageNotFoundError:
        text = (Path(__file__).resolve().parent.parent / "pyproject.toml").read_text(encoding="utf-8")
        return list(tomllib.loads(text)["project"]["dependencies"])


def _requirements(report: Report) -> None:
    from packaging.requirements import Requirement

    for requirement in map(Requirement, requirements()):
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        version = _version(requirement.name)
        wanted = f"{requirement.name}{requirement.specifier}"
        report.facts[requirement.name] = (
            f"{version or 'not installed'} (supported: {requirement.specifier or 'any'})"
        )
        if version is None:
            report.lacks(wanted, f"pip install '{wanted}'", prevents_training=True)
        elif not requirement.specifier.contains(version, prereleases=True):
            what = f"{wanted}: the installed version {version} is outside of the tested range"
            report.lacks(what, f"pip install '{wanted}'", prevents_training=True)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch(report: Report) -> None:
    import torch
    import torch.distributed as dist

    report.facts["CUDA of torch"] = torch.version.cuda or "none (a CPU build)"
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = (f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, sm_{gpu.major}{gpu.minor}" for gpu in gpus)
    report.facts["GPUs"] = "; ".join(names) or "none"
    driver = _driver_sees_gpus()
    if driver and not gpus:
        what = f"torch cannot use the {driver} GPU(s) that nvidia-smi lists"
        if torch.version.cuda is None:
            what += ": it is a CPU build"
        report.lacks(
            what, "install torch's build for the CUDA version that nvidia-smi shows: make clean setup"
        )
    if not dist.is_available() or not dist.is_gloo_available():
        report.lacks("gloo in torch.distributed", "install another build of torch", prevents_training=True)
    nccl = dist.is_available() and dist.is_nccl_available()
    report.facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version())) if nccl else "none"
    if gpus and not nccl:
        report.lacks(
            "NCCL in torch.distributed", "install a Linux build of torch with CUDA", prevents_training=True
        )


def _driver_sees_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    command = ["nvidia-smi", "--list-gpus"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return len(result.stdout.splitlines()) if result.returncode == 0 else 0


def _optional_packages(report: Report) -> None:
    for distribution, (module, purpose, extra) in OPTIONAL.items():
        version = _version(distribution)
        report.facts[distribution] = version or "not installed"
        remedy = INSTALL_GPU
        if extra != "gpu":
            remedy = f"pip install '{DISTRIBUTION}[{extra}]', or in a checkout: pip install -e '.[{extra}]'"
        if version is None:
            if extra != "gpu" or report.facts.get("GPUs", "none") != "none":
                report.lacks(f"{distribution} (optional: {purpose})", remedy)
            continue
        try:
            importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - told, whatever it is
            report.facts[distribution] += " (cannot be imported)"
            what = f"{distribution} {version} cannot be imported: {type(error).__name__}: {error}"
            report.lacks(what, f"pip uninstall {distribution}, or build it for this torch: {remedy}")


def _index_builder(report: Report) -> None:
    """Megatron's C++ module that builds the sample indices of a dataset."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    report.facts["C++ compiler"] = Path(compiler).name if compiler else "none"
    try:
        importlib.import_module("megatron.core.datasets.helpers_cpp")
        report.facts["helpers_cpp of Megatron"] = "compiled"
    except ImportError as error:
        report.facts["helpers_cpp of Megatron"] = "cannot be imported"
        remedy = "pip install --force-reinstall --no-deps megatron-core"
        if compiler is None:
            remedy = f"install a C++ compiler (Debian and Ubuntu: apt install g++), then {remedy}"
        report.lacks(f"helpers_cpp, which builds dataset indices: {error}", remedy, prevents_training=True)


def _machine(report: Report) -> None:
    import psutil

    memory = psutil.virtual_memory().total / GIB
    report.facts["CPU"] = f"{os.cpu_count()} cores, {memory:.0f} GiB of memory"
    for name, folder, enough, remedy in (
        (
            "free disk here",
            Path.cwd(),
            ENOUGH_DISK_GIB,
            "delete something, or give checkpoint.save on another disk",
        ),
        ("free temporary disk", Path(tempfile.gettempdir()), 1.0, "delete something, or set TMPDIR"),
    ):
        free = shutil.disk_usage(folder).free / GIB
        report.facts[name] = f"{free:.1f} GiB"
        if free < enough:
            report.lacks(f"{enough:g} GiB of {name} ({free:.1f} GiB found)", remedy)
    if Path("/dev/shm").is_dir():
        shared = shutil.disk_usage("/dev/shm").total / GIB
        report.facts["shared memory"] = f"{shared:.1f} GiB"
        if shared < ENOUGH_SHARED_MEMORY_GIB:
            what = (
                f"{ENOUGH_SHARED_MEMORY_GIB:g} GiB of shared memory for NCCL and data loaders ({shared:.2f} "
                "GiB found)"
            )
            report.lacks(what, "docker run --shm-size=8g ..., or --ipc=host")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = soft == resource.RLIM_INFINITY
    report.facts["open files (ulimit -n)"] = "unlimited" if unlimited else str(soft)
    if not unlimited and soft < ENOUGH_OPEN_FILES:
        enough = ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_OPEN_FILES)
        report.lacks(f"a limit of {ENOUGH_OPEN_FILES} open files ({soft} found)", f"ulimit -n {enough}")


def _paths(report: Report) -> None:
    import torch

    gpu = torch.cuda.is_available()
    why = "CUDA is available" if gpu else "there is no CUDA"
    report.paths["processes talk over"] = OperationPath("nccl" if gpu else "gloo", why)
    report.paths["attention"] = attention_backend()
    report.paths["layers"] = layers = layer_implementation()
    operators = layer_operators()
    if layers.choice == "transformer_engine":
        norm = "Transformer Engine, fused with the linear layer behind it"
        operators["RMSNorm"] = OperationPath(norm, f"layers are {layers.choice}")
    report.paths |= operators
    report.paths["optimizer adam"] = adam_implementation()
    report.paths["cross-entropy"] = loss_backend()


def attention_backend() -> OperationPath:
    """What `model.attention_backend: auto` becomes here for bfloat16 and heads of 128 channels."""
    import torch

    from lckv.attention.backends import choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose("auto", device=device, dtype=torch.bfloat16, head_dim=128)
    return OperationPath(choice.name, choice.reason)


def loss_backend() -> OperationPath:
    """What `model.cross_entropy_backend: auto` becomes here for bfloat16."""
    import torch

    from lckv.losses.backends import choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = choose("auto", device=device, dtype=torch.bfloat16)
    return OperationPath(choice.name, choice.reason)


def layer_operators() -> dict[str, OperationPath]:
    """What `model.operator_backend: auto` becomes here, for layers of the default size."""
    from megatron_ext.config import ModelConfig, ParallelConfig
    from megatron_ext.model.operators import choose_operators

    chosen = choose_operators(ModelConfig(), ParallelConfig())
    return {
        "RMSNorm": OperationPath(chosen.rms_norm.name, chosen.rms_norm.reason),
        "SwiGLU": OperationPath(chosen.swiglu.name, chosen.swiglu.reason),
        "RoPE": OperationPath(chosen.rope.name, chosen.rope.reason),
    }


def layer_implementation() -> OperationPath:
    """What `model.transformer_impl: auto` becomes here."""
    from megatron_ext.model.implementation import choose_implementation

    choice = choose_implementation("auto", "bf16")
    return OperationPath(choice.name, choice.reason)


def adam_implementation() -> OperationPath:
    """Which Adam Megatron's optimizers use."""
    from megatron.core import optimizer

    package = optimizer.Adam.__module__.partition(".")[0]
    reasons = {"transformer_engine": "Transformer Engine is installed", "apex": "apex is installed"}
    reason = reasons.get(package, "neither Transformer Engine nor apex is installed")
    return OperationPath(f"{package}: {optimizer.Adam.__name__}", reason)


def as_text(report: Report) -> Iterator[str]:
    """The report in lines for people."""
    yield "Found"
    for name, value in report.facts.items():
        yield f"  {name:<26} {value}"
    yield "Paths that operations take"
    for operation, path in report.paths.items():
        yield f"  {operation:<26} {path.choice} ({path.reason})"
    yield "Missing" if report.missing else "Nothing is missing"
    for entry in report.missing:
        yield f"  {'NEEDED: ' if entry.prevents_training else ''}{entry.what}"
        yield f"      {entry.remedy}"
    yield (
        "Training can run here."
        if report.can_train
        else "Training cannot run here: get what is marked NEEDED."
    )


def as_json(report: Report) -> str:
    """The report as one JSON object: found, paths, missing, can_train."""
    entries = asdict(report)
    return json.dumps({"found": entries.pop("facts"), **entries, "can_train": report.can_train}, indent=2)
