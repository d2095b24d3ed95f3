"""SentencePiece models, by themselves or as the only tokenizer file of a Hugging Face folder.

The model file splits text its own way. transformers converts such a file when it reads the folder, and its
conversion splits some texts, such as those that begin with spaces, otherwise.
"""

from itertools import groupby
from pathlib import Path
from typing import Any

from lckv.plain_files import read_plain
from lckv.tokenizer_files import MODEL_NAME
from lckv.weights.json_file import parse_json
from megatron_ext.data.vocabulary import LoadedTokenizer, named_eod, wrong_kind


def load_sentencepiece(path: Path) -> LoadedTokenizer:
    """A .model file. Raises ConfigError if it is none."""
    processor = _processor(path, "sentencepiece")
    pieces = _pieces(processor)
    eod = processor.eos_id()
    if eod < 0:
        eod = named_eod({piece: index for index, piece in pieces.items()}, path)
    return LoadedTokenizer(pieces, eod, processor.EncodeAsIds, processor.DecodeIds)


def load_sentencepiece_folder(folder: Path) -> LoadedTokenizer:
    """A folder whose tokenizer is tokenizer.model alone: the file's own splitting, with the tokens that the
    JSON files beside it add, and the end-of-document token that they name. Raises ConfigError if a file
    cannot be read."""
    processor = _processor(folder / MODEL_NAME, "huggingface")
    pieces = _pieces(processor)
    size = len(pieces)
    settings = json_object(folder / "tokenizer_config.json")
    added = {index: name for name, index in json_object(folder / "added_tokens.json").items()}
    added |= {
        int(index): token["content"] for index, token in settings.get("added_tokens_decoder", {}).items()
    }
    pieces |= {index: name for index, name in added.items() if index >= size}
    ids = {piece: index for index, piece in pieces.items()}
    eos = settings.get("eos_token") or json_object(folder / "special_tokens_map.json").get("eos_token")
    name = eos.get("content") if isinstance(eos, dict) else eos
    eod = ids.get(str(name), processor.eos_id())

    def decode(tokens: list[int]) -> str:
        runs = [(named, [*run]) for named, run in groupby(tokens, lambda token: token >= size)]
        return "".join(
            "".join(pieces[i] for i in run) if named else processor.DecodeIds(run) for named, run in runs
        )

    return LoadedTokenizer(pieces, named_eod(ids, folder) if eod < 0 else eod, processor.EncodeAsIds, decode)


def _processor(path: Path, kind: str) -> Any:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(read_plain(path))
    except (RuntimeError, OSError) as error:
        raise wrong_kind(path, kind, "not a SentencePiece model") from error
    if not processor.GetPieceSize():
        raise wrong_kind(path, kind, "it is empty")
    return processor


def _pieces(processor: Any) -> dict[int, str]:
    return {index: processor.IdToPiece(index) for index in range(processor.GetPieceSize())}


def json_object(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is no file."""
    try:
        values = parse_json(read_plain(path)) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise wrong_kind(path, "huggingface", error) from error
    if not isinstance(values, dict):
        raise wrong_kind(path, "huggingface", "not a JSON object")
    return values
