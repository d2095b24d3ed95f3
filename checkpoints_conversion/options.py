"""The options of the command line, and what --help teaches."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from checkpoints_conversion.compression_options import add_compression_options
from megatron_ext.arguments import memory_size, positive

_DESCRIPTION = """Converts models between Hugging Face and Megatron, exactly, and proves it by their logits.

Models are converted tensor by tensor: the memory needed does not grow with the model. The output folder must
be new; it gets its name when everything in it is whole and proven, so what is stopped leaves nothing behind.
{prog} SUBCOMMAND --help shows options and examples."""

_HF_TO_MEGATRON = """Makes a checkpoint of this project, for every parallel layout, from a Hugging Face model:
Llama 2 and 3, Mistral, Qwen2, Qwen3, SmolLM, and models that share keys and values (lckv-llama).

A plain model; one with a sharing map; one that is to get a KV policy (here P):
  hf-to-megatron --hf-path meta-llama/Llama-2-7b-hf --megatron-path ckpt/plain
  hf-to-megatron --hf-path models/eight-layers --megatron-path ckpt/lckv \\
      --compression.layer_types 0_6_6_6_6_6_6_7 --init svd --calibration-text wiki.train.txt
  hf-to-megatron --hf-path HuggingFaceTB/SmolLM2-135M --megatron-path ckpt/p --compression.policy.name P

Training goes on from it with
  torchrun pretrain_lckv.py --config run.yaml --config MEGATRON_PATH/model.yaml \\
      --checkpoint.load MEGATRON_PATH --checkpoint.finetune true"""

_MEGATRON_TO_HF = """Makes a Hugging Face model from a checkpoint of this project, whatever the layout that
saved it: config, safetensors, tokenizer, generation config, model card. A plain model is written under its
own architecture, which stock software runs; one that shares or merges as lckv-llama, with the files of its
model class beside the weights.

  megatron-to-hf --megatron-path runs/mine/checkpoints --hf-path out/model
  megatron-to-hf --megatron-path runs/mine/checkpoints/iter_0002000 --hf-path out/model \\
      --dtype bfloat16 --tokenizer tokenizer.model
  megatron-to-hf --megatron-path runs/family/checkpoints --hf-path out/half --layer-types 0_0_2_2

In Python:
  AutoModelForCausalLM.from_pretrained("out/model")
      after `import lckv.models`, for lckv-llama
  AutoModelForCausalLM.from_pretrained("out/model", trust_remote_code=True)
      where this project is not installed"""

_LEGACY_TO_MEGATRON = """Makes a checkpoint of this project from one in Megatron's older layout,
mp_rank_XX/model_optim_rng.pt, read without running anything that is pickled in it. The KV policy is the one
that knows the run's arguments as its own.

  legacy-to-megatron --legacy-path Llama-2-7B --megatron-path ckpt/llama --tokenizer tokenizer.model"""

_VERIFY = """Runs both models in float32 on the same tokens, Megatron's on the layout that is asked for, and
compares their logits. Where the checkpoint was converted to a sharing map or a policy, the same is done to
the Hugging Face model first.

  verify --hf-path meta-llama/Llama-2-7b-hf --megatron-path ckpt/llama2-7b
  verify --hf-path A --megatron-path B --nproc-per-node 2 --parallel.tensor_model_parallel_size 2
  verify --hf-path A --megatron-path B --tokens tokens.npy --tolerance 1e-3

A model that does not fit into the memory, a few layers at a time, or some of its layers:
  verify --hf-path A --megatron-path B --layers-at-once 2
  verify --hf-path A --megatron-path B --layers 0,19,38-39

Exit status: 0 equal up to rounding, 1 different, 2 not comparable."""

_INSPECT = """Says what a model is: a Hugging Face folder or name on the Hub, a checkpoint of this project or
of Megatron's older layout. No weights are read.

  inspect out/model
  inspect runs/mine/checkpoints --json"""

_DTYPES = ("keep", "float32", "bfloat16")


def build_parser(prog: str) -> argparse.ArgumentParser:
    """All subcommands; the name of the one given is `command`. `prog`: how the program was called."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_DESCRIPTION.format(prog=prog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="SUBCOMMAND", required=True)
    for name, (text, add_options) in _COMMANDS.items():
        summary = " ".join(text.partition("\n\n")[0].split())
        command = commands.add_parser(
            name,
            help=re.split(r"(?<=[a-z])[.:,] ", summary)[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_options(command)
    return parser


def _add_hf_to_megatron(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-path", required=True, help="folder of the model, or its name on the Hugging Face Hub"
    )
    parser.add_argument(
        "--megatron-path", type=Path, required=True, help="folder to write; must be new or empty"
    )
    parser.add_argument(
        "--init",
        choices=("average", "copy", "svd"),
        default="average",
        help="keys and values of a sharing map: those of the layer itself (copy), or the mean over all "
        "layers that will read them (average, the default; MLKV), or fitted with the readers' queries and "
        "outputs to what the model computes on --calibration-text (svd; the best start, see "
        "docs/initialization.md)",
    )
    parser.add_argument(
        "--calibration-text",
        type=Path,
        metavar="FILE",
        help="of --init svd: a text in UTF-8, like those that the model is for; not one that it will be "
        "measured on",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=positive,
        metavar="N",
        help="how many of its first tokens: a multiple of 512 (default: 4096)",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model.bin where there are no safetensors; only tensors are unpickled",
    )
    _add_dtype_and_verify(parser)
    add_compression_options(parser)


def _add_megatron_to_hf(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--megatron-path", type=Path, required=True, help="directory of checkpoints, or one checkpoint"
    )
    parser.add_argument("--hf-path", type=Path, required=True, help="folder to write; must be new or empty")
    _add_layer_types(parser)
    parser.add_argument(
        "--family",
        help="model type to write: llama, mistral, qwen2, qwen3 or lckv-llama (default: one that stock "
        "software runs, where the model allows it)",
    )
    parser.add_argument(
        "--max-shard-size",
        type=memory_size,
        default="5GB",
        metavar="SIZE",
        help="largest file of weights, such as 500MB (default: %(default)s)",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="folder or file of the tokenizer, or none (default: that of the run, or of the model it started "
        "from)",
    )
    parser.add_argument(
        "--metrics-file",
        type=Path,
        help="JSON lines of the run, for what was measured in the model card (default: the run's)",
    )
    _add_dtype_and_verify(parser)


def _add_legacy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--legacy-path", type=Path, required=True, help="folder of one iteration, or the one with all of them"
    )
    parser.add_argument(
        "--megatron-path", type=Path, required=True, help="folder to write; must be new or empty"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="folder or file of the model's tokenizer, to be remembered"
    )
    _add_unsaid(parser)
    _add_dtype_and_verify(parser)


def _add_unsaid(parser: argparse.ArgumentParser) -> None:
    """What a checkpoint in Megatron's older layout may not say."""
    parser.add_argument(
        "--vocab-size",
        type=int,
        help="true size of the vocabulary, in tokens, where a checkpoint in Megatron's older layout does not "
        "say it",
    )
    parser.add_argument(
        "--argument",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an argument of its run that such a checkpoint does not say, or says wrongly (may be given "
        "again)",
    )


def _add_layer_types(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer-types",
        metavar="MAP",
        help="of a checkpoint that was trained with a family of maps: the map to take; weights that it "
        "does not need are left out",
    )


def _add_dtype_and_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="keep", help="of the weights written (default: as they are)"
    )
    parser.add_argument(
        "--verify",
        choices=("auto", "always", "never"),
        default="auto",
        help="compare the logits of both models before the folder gets its name; auto, the default: of the "
        "whole models up to 3 billion parameters, if both fit into the memory one after the other, else of "
        "a few of their layers",
    )
    parser.add_argument(
        "--no-verify", dest="verify", action="store_const", const="never", help="--verify never"
    )


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hf-path",
        required=True,
        help="folder of the model, its name on the Hugging Face Hub, or a checkpoint in Megatron's older "
        "layout",
    )
    parser.add_argument(
        "--megatron-path", type=Path, required=True, help="directory of checkpoints, or one checkpoint"
    )
    parser.add_argument(
        "--nproc-per-node", type=int, help="processes for Megatron (default: as many as the layout needs)"
    )
    for size, what in (
        ("tensor", "ranks that split each weight matrix"),
        ("pipeline", "ranks that split the layers"),
    ):
        parser.add_argument(
            f"--parallel.{size}_model_parallel_size",
            dest=size,
            type=int,
            default=1,
            help=f"{what} (default: 1)",
        )
    parser.add_argument(
        "--tokens", type=Path, help="int64 [B, T] in numpy's .npy format (default: random tokens)"
    )
    some = parser.add_mutually_exclusive_group()
    some.add_argument(
        "--layers",
        help="compare only these layers of both models, and those whose keys and values they read, such as "
        "0,5,38-39 (default: the whole models)",
    )
    some.add_argument(
        "--layers-at-once",
        type=positive,
        help="compare all layers, so many at a time: takes the memory of so many instead of the whole models",
    )
    parser.add_argument("--rows", type=int, default=4, help="rows of random tokens (default: %(default)s)")
    parser.add_argument(
        "--seq-length", type=int, default=128, help="tokens per row of random tokens (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of random tokens (default: %(default)s)")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        help="largest |difference| allowed, as a share of the largest |logit| (default: %(default)s)",
    )
    parser.add_argument(
        "--agreement",
        type=float,
        default=0.999,
        help="least share of positions with the same likeliest token (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=3600.0,
        help="seconds for Megatron's processes (default: %(default)s)",
    )
    parser.add_argument("--allow-pickle", action="store_true", help="as in hf-to-megatron")
    _add_layer_types(parser)
    _add_unsaid(parser)


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", help="folder of the model, or its name on the Hugging Face Hub")
    parser.add_argument("--json", action="store_true", help="print JSON")
    _add_layer_types(parser)
    _add_unsaid(parser)


_COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "hf-to-megatron": (_HF_TO_MEGATRON, _add_hf_to_megatron),
    "megatron-to-hf": (_MEGATRON_TO_HF, _add_megatron_to_hf),
    "legacy-to-megatron": (_LEGACY_TO_MEGATRON, _add_legacy),
    "verify": (_VERIFY, _add_verify),
    "inspect": (_INSPECT, _add_inspect),
}
