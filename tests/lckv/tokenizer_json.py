"""A small tokenizer, and what it is trained on."""

from collections.abc import Sequence
from pathlib import Path

TEXTS = [f"hello world, document {number} of the corpus: {'word ' * (number % 7)}\n" for number in range(60)]


def write_tokenizer_json(path: Path, special: Sequence[str] = ("<|endoftext|>",)) -> Path:
    """A byte-level BPE tokenizer of the tokenizers library."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return path
