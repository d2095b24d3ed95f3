"""Turns raw text into Megatron's indexed datasets.

    lckv-megatron preprocess --input 'corpus/*.jsonl.zst' --output-prefix data/corpus \\
        --tokenizer-type sentencepiece --tokenizer-model tokenizer.model --workers 8
"""

import argparse
import glob
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from tqdm import tqdm

from megatron_ext.arguments import ProgramParser, positive
from megatron_ext.config import DataFormat
from megatron_ext.data.description import DatasetManifest
from megatron_ext.data.encoding import Stretch
from megatron_ext.data.job import PreprocessingJob
from megatron_ext.data.merging import merge_shards
from megatron_ext.data.parts import take_part
from megatron_ext.data.preprocessing import preprocess
from megatron_ext.data.sources import find_sources
from megatron_ext.data.tokenizers import KINDS
from megatron_ext.errors import ConfigError

EXAMPLES = """
input
  JSON lines, one object per document with its text under --json-keys, and text files, one document each;
  both also compressed (gzip, zstd). Parquet files (with pip install 'lckv-megatron[parquet]'), one document
  per row with its text in the columns --json-keys. The content of a file says what it is; what could be two
  things is refused. A directory stands for all its files, a quoted glob for those that match. Documents come
  out in the order of the input.

conversations
  With --data-format chat a record has a list of messages under --json-keys (default messages), each with role
  and content, or from and value, and perhaps the tools that may be called. The tokenizer's chat template
  writes them; what the assistant says is learned, the rest is read only (data.format: chat).

output
  PREFIX.bin (tokens), PREFIX.idx (where documents begin) and PREFIX.dataset.json (tokenizer, numbers,
  options and sources; training checks it). Files that are an input, or no dataset of this program, are never
  replaced. With --shards or --shard-mib: PREFIX-00000.*, PREFIX-00001.*, ... A job that is started again goes
  on behind its last complete shard, and stops if options or input have changed. With --part I/N: a dataset of
  the I-th of N parts of the files, PREFIX-0000I-of-0000N. Shards and parts can be trained on as they are, or
  be merged; merged parts are the dataset that one machine would have made.

examples
  # a compressed corpus with a SentencePiece tokenizer, on 8 processes
  lckv-megatron preprocess --input 'corpus/*.jsonl.zst' --output-prefix data/corpus \\
      --tokenizer-type sentencepiece --tokenizer-model tokenizer.model --workers 8

  # a directory of sources with a Hugging Face tokenizer
  lckv-megatron preprocess --input src/ --suffix .py .md --output-prefix data/code \\
      --tokenizer-type huggingface --tokenizer-model path/to/model

  # conversations for supervised fine-tuning
  lckv-megatron preprocess --data-format chat --input chats.jsonl --output-prefix data/chats \\
      --tokenizer-type huggingface --tokenizer-model path/to/model

  # 64 shards that can be interrupted, then one dataset of them
  lckv-megatron preprocess --input big.jsonl --output-prefix shards/big --shards 64 \\
      --tokenizer-type tiktoken --tokenizer-model tokenizer.model --workers 32
  lckv-megatron preprocess --merge --input 'shards/big-*.idx' --output-prefix data/big

  # the second of eight machines, which work at the same time, each on its files (examples/cluster_data)
  lckv-megatron preprocess --input 'corpus/*.jsonl.zst' --output-prefix parts/big --part 1/8 \\
      --tokenizer-type huggingface --tokenizer-model path/to/model --workers 32
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status: 0, or 2 after a message about what to change."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if arguments.merge:
            if arguments.part is not None:
                raise ConfigError("--part is for tokenizing; --merge takes all parts. Leave --part out.")
            prefixes = _prefixes_to_merge(arguments.input)
            merged = merge_shards(prefixes, arguments.output_prefix, overwrite=arguments.overwrite)
            _print_summary({arguments.output_prefix: merged})
        else:
            _print_summary(_preprocess(_job(arguments), overwrite=arguments.overwrite))
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser("preprocess", __doc__, epilog=EXAMPLES)
    files = parser.add_argument_group("files")
    files.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, directories or quoted globs"
    )
    files.add_argument(
        "--output-prefix", required=True, metavar="PREFIX", help="path of the output without .bin or .idx"
    )
    files.add_argument(
        "--suffix", nargs="+", default=[], help="take only files whose names end with one of these"
    )
    files.add_argument(
        "--text-format",
        choices=("auto", "jsonl", "text"),
        default="auto",
        help="default auto: by the content of the files",
    )
    files.add_argument(
        "--json-keys",
        nargs="+",
        metavar="KEY",
        help="default text (chat: messages); of several each gets PREFIX_KEY; columns of Parquet files",
    )
    files.add_argument(
        "--data-format",
        choices=get_args(DataFormat),
        default="pretraining",
        help="what records are: texts, or conversations (default pretraining)",
    )
    files.add_argument(
        "--skip-bad-lines", action="store_true", help="count bad records instead of stopping at the first"
    )
    files.add_argument(
        "--max-document-mib",
        type=positive,
        default=64,
        metavar="MIB",
        help="longest document; bounds memory (default 64)",
    )
    tokens = parser.add_argument_group("tokens")
    tokens.add_argument("--tokenizer-type", choices=KINDS)
    tokens.add_argument("--tokenizer-model", metavar="PATH", help="file or directory of the tokenizer")
    tokens.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        help="end each document with the end-of-document token (default: yes; chat: no)",
    )
    tokens.add_argument("--workers", type=positive, default=1, help="processes that tokenize (default 1)")
    shards = parser.add_argument_group("shards")
    size = shards.add_mutually_exclusive_group()
    size.add_argument(
        "--shards", type=positive, metavar="N", help="split the output into N; reads compressed input twice"
    )
    size.add_argument(
        "--shard-mib", type=positive, metavar="MIB", help="split the output after so much input text"
    )
    shards.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="take the files of part I of N only, counted from 0: each machine of a cluster makes one",
    )
    shards.add_argument("--overwrite", action="store_true", help="replace the dataset of an earlier job")
    shards.add_argument(
        "--merge", action="store_true", help="inputs are datasets (prefixes or .idx files): append them"
    )
    return parser


def _job(arguments: argparse.Namespace) -> PreprocessingJob:
    if arguments.tokenizer_type is None or arguments.tokenizer_model is None:
        raise ConfigError("--tokenizer-type and --tokenizer-model are needed to tokenize (not with --merge).")
    is_chat = arguments.data_format == "chat"
    sources = find_sources(arguments.input, suffixes=arguments.suffix, text_format=arguments.text_format)
    part, prefix = None, arguments.output_prefix
    if arguments.part is not None:
        part, sources = take_part(sources, *arguments.part)
        prefix = part.prefix(prefix)
    return PreprocessingJob(
        sources=tuple(sources),
        output_prefix=prefix,
        tokenizer_type=arguments.tokenizer_type,
        tokenizer_model=arguments.tokenizer_model,
        json_keys=tuple(arguments.json_keys or (["messages"] if is_chat else ["text"])),
        append_eod=not is_chat if arguments.append_eod is None else arguments.append_eod,
        data_format=arguments.data_format,
        workers=arguments.workers,
        shards=arguments.shards,
        shard_text_bytes=arguments.shard_mib and arguments.shard_mib << 20,
        skip_bad_records=arguments.skip_bad_lines,
        max_document_bytes=arguments.max_document_mib << 20,
        part=part,
    )


def _part(text: str) -> tuple[int, int]:
    """I and N of --part I/N."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no part; I/N is wanted, such as 0/8, 1/8 and so on up to 7/8"
        )
    return int(match[1]), int(match[2])


def _preprocess(job: PreprocessingJob, *, overwrite: bool) -> dict[str, DatasetManifest]:
    total = sum(source.size for source in job.sources)
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizing", mininterval=0.5) as bar:
        begin: list[Stretch] = []
        tokens = 0

        def report(stretch: Stretch, new_tokens: int) -> None:
            nonlocal tokens
            if not begin:
                begin.append(stretch)
                bar.initial = bar.n = stretch.disk_bytes
            tokens += new_tokens
            seconds = max(bar.format_dict["elapsed"], 1e-9)
            text_rate = (stretch.end.text_bytes - begin[0].end.text_bytes) / seconds
            bar.set_postfix_str(
                f"text {text_rate / 1e6:.1f} MB/s, {tokens / seconds:,.0f} tokens/s", refresh=False
            )
            bar.update(stretch.disk_bytes - bar.n)

        return preprocess(job, report, overwrite=overwrite)


def _prefixes_to_merge(inputs: Sequence[str]) -> list[str]:
    """Prefixes that are named, or whose files are; those of a glob sorted."""
    prefixes: list[str] = []
    for entry in inputs:
        path = Path(entry)
        matches = (
            sorted(str(file) for file in path.parent.glob(path.name))
            if glob.has_magic(path.name)
            else [entry]
        )
        if not matches:
            raise ConfigError(f"--input {entry!r} stands for no file.")
        prefixes += [re.sub(r"\.(idx|bin|dataset\.json|json)$", "", file) for file in matches]
    return list(dict.fromkeys(prefixes))


def _print_summary(manifests: Mapping[str, DatasetManifest]) -> None:
    for prefix, manifest in manifests.items():
        skipped = f", {manifest.skipped_records:,} bad records skipped" if manifest.skipped_records else ""
        print(
            f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens "
            f"({manifest.dtype}){skipped}"
        )


if __name__ == "__main__":
    sys.exit(main())
