"""SentencePiece models for transformers, with the model file's own splitting.

transformers converts a tokenizer.model that has no tokenizer.json beside it when it reads the folder. It
ignores the scores in the file, and it splits texts that begin with spaces otherwise. A model that was trained
on the file's own splitting then sees other tokens.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from lckv.errors import ModelError
from lckv.plain_files import read_plain
from lckv.tokenizer_files import PROBES


def use_own_splitting(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Make a tokenizer that transformers converted from the SentencePiece model at `path` split as that does.

    Its added tokens, template and begin and end tokens stay. Raises ModelError where the model cannot be
    converted exactly and transformers' conversion splits otherwise.
    """
    import sentencepiece

    try:
        converted, _ = convert(path)
    except ModelError as error:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        for text in PROBES:
            theirs = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
            if theirs != processor.EncodeAsIds(text):
                raise ModelError(
                    f"{path}: transformers splits {text!r} otherwise than this file does, and an exact "
                    f"conversion is not known: {error} Add a tokenizer.json that splits as the model was "
                    "trained."
                ) from error
        return
    backend: Any = tokenizer.backend_tokenizer
    backend.model, backend.normalizer = converted.model, converted.normalizer
    backend.pre_tokenizer, backend.decoder = None, converted.decoder


def convert(path: Path) -> tuple[Any, dict[str, str]]:
    """A `tokenizers.Tokenizer` that splits as the model file at `path`, and the special tokens by their names
    in tokenizer_config.json.

    Raises ModelError for models that cannot be converted exactly: other than BPE, or changing the text first.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # needs protobuf, which tensorboard brings
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    proto = ModelProto()
    try:
        proto.ParseFromString(read_plain(path))
    except (OSError, DecodeError) as error:
        raise ModelError(f"{path} is no SentencePiece model: {error}.") from error
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    scored = [(piece.piece, piece.score) for piece in proto.pieces]
    from_text = [(piece.piece, piece.score) for piece in proto.pieces if piece.type == piece.NORMAL]
    if trainer.model_type != trainer.BPE:
        raise ModelError(f"{path} is no BPE model; no others can be converted.")
    if normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap:
        raise ModelError(
            f"{path} changes the text before it splits it (normalization {normalizer.name!r}, "
            "remove_extra_whitespaces "
            f"{normalizer.remove_extra_whitespaces}); only models that keep the text as it is can be "
            "converted."
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
