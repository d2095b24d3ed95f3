"""Trains a SentencePiece tokenizer in the manner of Llama 2.

That is byte-pair encoding with byte fallback, single digits, and white space kept.
"""

import argparse
import io
import logging
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_ext.arguments import ProgramParser
from megatron_ext.atomic import write_file
from megatron_ext.data.outputs import check_replaceable
from megatron_ext.data.records import parse_texts
from megatron_ext.data.sources import RecordReader, Source, find_sources, text_bytes
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

EXAMPLES = """
Input is as for lckv-megatron preprocess: JSON lines, text and Parquet files; directories; quoted globs.

Training keeps its sample of the text in memory, several times over. If there is more text than --max-mib,
each document is taken with the same probability, drawn from --seed. The same input, options and version of
SentencePiece give the same model.

examples
  lckv-megatron train-tokenizer --input corpus.jsonl --vocab-size 8192 --output tokenizer.model
  lckv-megatron train-tokenizer --input 'wiki/*.jsonl.gz' src/ --vocab-size 32000 --max-mib 500 \\
      --output tokenizer.model
"""

_SENTENCE_CHARACTERS = 4000
"""Longer lines are cut: SentencePiece leaves out sentences of more than a certain number of bytes."""


@dataclass(frozen=True)
class TokenizerTraining:
    """What to train on, and for what."""

    sources: tuple[Source, ...]
    vocab_size: int
    json_key: str = "text"
    max_bytes: int = 200 << 20
    seed: int = 1234
    threads: int = 4


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program. Returns its exit status: 0, or 2 after a message about what to change."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sources = find_sources(arguments.input, suffixes=arguments.suffix, text_format=arguments.text_format)
        check_replaceable(Path(arguments.output), [source.path for source in sources], _was_trained_here)
        training = TokenizerTraining(
            tuple(sources),
            arguments.vocab_size,
            json_key=arguments.json_key,
            max_bytes=arguments.max_mib << 20,
            seed=arguments.seed,
            threads=arguments.threads,
        )
        write_file(Path(arguments.output), train(training))
        tokenizer = load_tokenizer("sentencepiece", arguments.output)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.output}: {tokenizer.vocab_size} tokens, fingerprint {tokenizer.fingerprint}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ProgramParser("train-tokenizer", __doc__, epilog=EXAMPLES)
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="PATH", help="files, directories or quoted globs"
    )
    parser.add_argument("--output", required=True, metavar="FILE.model", help="the model to write")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="tokens, with 256 bytes and 3 control tokens"
    )
    parser.add_argument(
        "--suffix", nargs="+", default=[], help="take only files whose names end with one of these"
    )
    parser.add_argument(
        "--text-format", choices=("auto", "jsonl", "text"), default="auto", help="default: by content"
    )
    parser.add_argument("--json-key", default="text", help="where JSON lines have their text (default text)")
    parser.add_argument(
        "--max-mib", type=int, default=200, help="sample at most about so much text (default 200)"
    )
    parser.add_argument("--seed", type=int, default=1234, help="which documents are sampled (default 1234)")
    parser.add_argument("--threads", type=int, default=4, help="threads of the training (default 4)")
    return parser


def _was_trained_here(path: Path) -> bool:
    """Whether a file is a model that `train` made: no other program takes sentences of such a length."""
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        return False
    return model.trainer_spec.max_sentence_length == 4 * _SENTENCE_CHARACTERS


def train(training: TokenizerTraining) -> bytes:
    """Train a model. Returns it serialized.

    Raises ConfigError if the input has no text or too little for the vocabulary, or holds a bad record.
    """
    import sentencepiece

    model = io.BytesIO()
    failures: list[Exception] = []
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_noting(_sentences(training), failures),
            model_writer=model,
            model_type="bpe",
            vocab_size=training.vocab_size,
            num_threads=training.threads,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _SENTENCE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=1,
        )
    except RuntimeError as error:
        if failures:
            raise failures[0] from None
        raise ConfigError(
            f"no tokenizer of --vocab-size={training.vocab_size} can be trained on this text. SentencePiece "
            f"says: {error}"
        ) from error
    return model.getvalue()


def _noting(sentences: Iterator[str], failures: list[Exception]) -> Iterator[str]:
    """Keep what is raised while SentencePiece reads: it turns every exception into a RuntimeError."""
    try:
        yield from sentences
    except Exception as error:
        failures.append(error)
        raise


def _sentences(training: TokenizerTraining) -> Iterator[str]:
    """The lines of the sampled documents, cut to the length that SentencePiece takes."""
    share = training.max_bytes / max(1, text_bytes(training.sources, [training.json_key]))
    chance = random.Random(training.seed)
    reader = RecordReader(training.sources, columns=[training.json_key])
    total = sum(source.size for source in training.sources)
    empty = True
    with tqdm(total=total, unit="B", unit_scale=True, desc="reading", mininterval=0.5) as bar:
        for record in reader:
            bar.update(reader.disk_bytes - bar.n)
            if share < 1 and chance.random() >= share:
                continue
            for line in parse_texts(record, (training.json_key,))[0].splitlines():
                for start in range(0, len(line), _SENTENCE_CHARACTERS):
                    empty = False
                    yield line[start : start + _SENTENCE_CHARACTERS]
        bar.update(total - bar.n)
    if empty:
        raise ConfigError(
            "no text in the input: all documents are empty. Give other files or another --json-key."
        )
    logger.info("training on it; this takes about a second per MB")


if __name__ == "__main__":
    sys.exit(main())
