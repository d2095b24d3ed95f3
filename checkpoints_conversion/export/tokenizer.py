"""Tokenizer files beside exported weights: those of the source, or made from the vocabulary that a run was
trained with.

SentencePiece and tiktoken vocabularies become a tokenizer.json that transformers reads. The result is tried
on a few texts before it is accepted, for transformers does not always give the ids that the model was trained
on: it ignores the scores of a SentencePiece file, and replaces the tokenizer
of some types of models by another one.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from checkpoints_conversion.errors import ConversionError
from megatron_ext.atomic import write_file
from megatron_ext.data.tokenizers import TIKTOKEN_PATTERN, Tokenizer, load_tokenizer
from megatron_ext.errors import ConfigError

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt",
)  # fmt: skip
"""What a tokenizer consists of in a Hugging Face folder; no folder has all of them."""

_PROBES = (
    "The quick brown fox jumps over the lazy dog, 1234567890 times.",
    "  two spaces,\n\n\ta tab, and more   \n        than   four     ",
    "def f(x: int) -> str:\n    return f'{x:>12}'  # comment\n",
    "naïve café — “quotes”, Ελληνικά, русский, 漢字かな, 한국어, 🙂👍🏽, \u200b\u00a0",
    " ",
    "\r\n",
    "<s>text</s> <unk><0x0A> <|end_of_text|>",
)
"""Texts on which the exported tokenizer must agree with the original."""


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer that can be copied."""
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def write_tokenizer(kind: str, path: Path, folder: Path) -> list[str]:
    """Write the tokenizer that `megatron_ext.data.tokenizers.load_tokenizer(kind, path)` loads as files that
    transformers reads.

    A folder's files are copied as they are. Returns the names of the files. Raises ConfigError where the
    tokenizer cannot be loaded, and ConversionError where transformers would make something else of it in
    `folder`, whose config.json is there already.
    """
    if kind == "huggingface" and path.is_dir():
        names = [name for name in TOKENIZER_FILES if (path / name).is_file()]
        for name in names:
            shutil.copyfile(path / name, folder / name)
        try:
            original = load_tokenizer(kind, str(path))
        except ConfigError as error:
            logger.warning("the tokenizer is copied as it is, and was not tried: %s", error)
            return names
    else:
        original = load_tokenizer(kind, str(path))
        names = _make(kind, path, original, folder)
    _check_agreement(original, path, folder)
    return names


def _make(kind: str, path: Path, original: Tokenizer, folder: Path) -> list[str]:
    if kind == "huggingface":
        content, named = path.read_bytes(), {"eos_token": original.decode([original.eod])}
    else:
        tokenizer, named = (
            _from_sentencepiece(path) if kind == "sentencepiece" else _from_tiktoken(path, original)
        )
        content = tokenizer.to_str(pretty=True).encode()
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    write_file(folder / "tokenizer.json", content)
    write_file(folder / "tokenizer_config.json", json.dumps(config, indent=1, ensure_ascii=False).encode())
    return ["tokenizer.json", "tokenizer_config.json"]


def kind_of(path: Path) -> str:
    """The kind of tokenizer, as in the setting data.tokenizer_type, that a file or folder holds."""
    if path.is_dir() or path.suffix == ".json":
        return "huggingface"
    with path.open("rb") as file:
        first = file.readline(200).split()
    return "tiktoken" if len(first) == 2 and first[1].isdigit() else "sentencepiece"


def _check_agreement(original: Tokenizer, source: Path, folder: Path) -> None:
    tokenizer = load_tokenizer("huggingface", str(folder))
    for text in _PROBES:
        expected, exported = original.encode(text), tokenizer.encode(text)
        if expected != exported:
            raise ConversionError(
                f"the tokenizer {source} gives {expected} for {text!r}, but exported, transformers makes "
                f"{exported} of it: for models of some types it takes a tokenizer class of its own. Export "
                "under another --family, such as lckv-llama."
            )


def _from_sentencepiece(path: Path) -> tuple[Any, dict[str, str]]:
    """A `tokenizers.Tokenizer`, and the special tokens by their names in tokenizer_config.json."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # needs protobuf, which tensorboard brings
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    proto = ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    scored = [(piece.piece, piece.score) for piece in proto.pieces]
    from_text = [(piece.piece, piece.score) for piece in proto.pieces if piece.type == piece.NORMAL]
    if trainer.model_type != trainer.BPE:
        raise ConversionError(f"{path} is no BPE model; no others can be exported.")
    if normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap:
        raise ConversionError(
            f"{path} changes the text before it splits it (normalization {normalizer.name!r}, "
            f"remove_extra_whitespaces {normalizer.remove_extra_whitespaces}); only models that keep the "
            "text as it is can be exported."
        )
    vocabulary = {piece: index for index, (piece, _) in enumerate(scored)}
    merges = list(_merges(from_text))
    tokenizer = Tokenizer(
        BPE(
            vocabulary,
            merges,
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
        )
    )
    prefix = [normalizers.Prepend("▁")] if normalizer.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if normalizer.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    control = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    ids = {"unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id}
    return tokenizer, {f"{name}_token": scored[index][0] for name, index in ids.items() if index >= 0}


def _merges(scored: list[tuple[str, float]]) -> Iterator[tuple[str, str]]:
    """The pairs that make up each piece, in the order in which they are merged.

    SentencePiece takes the piece with the highest score, wherever it is leftmost, so all pairs that make the
    same piece come at once. Pieces of equal score are runs of spaces; they grow from the left, that is, by
    the pair whose first part is longest.
    """
    vocabulary = {piece for piece, _ in scored}
    pairs = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in scored
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    for _, _, left, right in sorted(pairs, key=lambda pair: pair[:2]):
        yield left, right


def _from_tiktoken(path: Path, original: Tokenizer) -> tuple[Any, dict[str, str]]:
    """As `_from_sentencepiece`."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    special = [original.decode([index]) for index in range(ranks, original.vocab_size)]
    tokenizer = TikTokenConverter(str(path), TIKTOKEN_PATTERN, extra_special_tokens=special).converted()
    return tokenizer, {"bos_token": special[0], "eos_token": original.decode([original.eod])}
