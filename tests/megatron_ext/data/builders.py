"""Small tokenizers and datasets for the tests of the data package and its tools."""

import base64
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_ext.data.description import DatasetManifest, write_manifest
from megatron_ext.data.indexed import IndexedWriter, token_dtype
from megatron_ext.data.marks import MARKED_DTYPE, marked
from tests.lckv.tokenizer_json import TEXTS

FINGERPRINT = "0123456789abcdef"
EOD = 0
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def train_sentencepiece(path: Path, vocab_size: int = 320) -> Path:
    """A tiny SentencePiece model; unknown, begin and end of text are 0, 1, 2."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def save_tokenizer(folder: Path, template: str | None) -> Path:
    """A Hugging Face folder: every byte is a token, <|end|> ends a turn, and the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|start|>"]
    )
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder


def write_ranks(path: Path) -> Path:
    """A tiktoken file of the 256 bytes and three merges."""
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell"]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    return path


def write_dataset(
    prefix: Path | str,
    documents: Sequence[Sequence[int]],
    *,
    vocab_size: int = 1000,
    fingerprint: str = FINGERPRINT,
    append_eod: bool = True,
    manifest: bool = True,
) -> str:
    """An indexed dataset of these documents, by default with its description. Returns the prefix."""
    dtype = token_dtype(vocab_size)
    with IndexedWriter(str(prefix), dtype) as writer:
        for document in documents:
            writer.add(np.array(document, dtype), np.array([len(document)], np.int32))
        writer.close()
    if manifest:
        description = DatasetManifest(
            tokenizer_type="sentencepiece",
            tokenizer_fingerprint=fingerprint,
            vocab_size=vocab_size,
            eod=EOD,
            dtype=str(dtype),
            append_eod=append_eod,
            documents=len(documents),
            tokens=sum(len(document) for document in documents),
            max_token_id=max((max(document) for document in documents), default=-1),
            json_key="text",
            skipped_records=0,
            sources=(),
        )
        write_manifest(str(prefix), description)
    return str(prefix)


def write_chats(
    prefix: Path | str,
    chats: Sequence[tuple[Sequence[int], Sequence[bool]]],
    *,
    vocab_size: int = 1000,
    **options: Any,
) -> str:
    """A dataset of conversations: tokens, and which are learned. Returns the prefix."""
    with IndexedWriter(str(prefix), MARKED_DTYPE) as writer:
        for tokens, learned in chats:
            writer.add(marked(np.array(tokens), np.array(learned)), np.array([len(tokens)], np.int32))
        writer.close()
    description = DatasetManifest(
        tokenizer_type="huggingface",
        tokenizer_fingerprint=FINGERPRINT,
        vocab_size=vocab_size,
        eod=EOD,
        dtype=str(MARKED_DTYPE),
        append_eod=False,
        documents=len(chats),
        tokens=sum(len(tokens) for tokens, _ in chats),
        max_token_id=max(max(tokens) for tokens, _ in chats),
        json_key="messages",
        skipped_records=0,
        sources=(),
        data_format="chat",
    )
    write_manifest(str(prefix), replace(description, **options))
    return str(prefix)


def random_chats(
    count: int, *, vocab_size: int = 97, longest: int = 20, seed: int = 1
) -> list[tuple[list[int], list[bool]]]:
    """Conversations of 3 to `longest` tokens, of which a random half is learned, the last one always; few
    are long."""
    random = np.random.default_rng(seed)
    chats = []
    for length in np.minimum(3 + random.geometric(0.15, count), longest).tolist():
        learned = random.random(length) < 0.5
        learned[0], learned[-1] = False, True
        chats.append((random.integers(1, vocab_size, length).tolist(), learned.tolist()))
    return chats


def numbered_documents(lengths: Sequence[int], first: int = 1) -> list[list[int]]:
    """Documents of these lengths, whose tokens count upwards through all of them; each ends with `EOD`."""
    documents, token = [], first
    for length in lengths:
        documents.append([*range(token, token + length - 1), EOD])
        token += length - 1
    return documents
