import os
import pickle
import re
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data.index_cache import ArrayFile
from megatron_ext.data.loader import build_data_iterator
from megatron_ext.data.samples import DocumentRange, EpochSamples, build_epochs, document_range
from megatron_ext.errors import ConfigError
from tests.megatron_ext.data.builders import EOD, numbered_documents, write_dataset

lengths_of = st.lists(st.integers(1, 30), min_size=1, max_size=25)


def open_samples(
    folder: Path,
    documents: DocumentRange,
    *,
    seq_length: int,
    samples: int,
    seed: int = 1,
    vocab_size: int = 1000,
) -> EpochSamples:
    index = build_epochs(
        folder / "cache", documents, name="train", seq_length=seq_length, samples=samples, seed=(seed, 0)
    )
    return EpochSamples(
        documents.prefix, str(index), length=samples, seq_length=seq_length, vocab_size=vocab_size
    )


def texts_of(samples: EpochSamples) -> list[list[int]]:
    """Tokens of each sample with the last label behind them."""
    items = [samples[number] for number in range(len(samples))]
    assert all(item["labels"][:-1].equal(item["tokens"][1:]) for item in items)
    return [[*item["tokens"].tolist(), item["labels"][-1].item()] for item in items]


def stream_of(texts: list[list[int]]) -> list[int] | None:
    """The texts laid end to end, each beginning with the token that another ends with; None if they do not
    fit."""
    # Only usable where every token occurs once, which makes the order of the samples plain.
    by_first = {text[0]: text for text in texts}
    start = set(by_first) - {text[-1] for text in texts}
    if len(start) != 1:
        return None
    text = by_first[start.pop()]
    stream = list(text)
    while text[-1] in by_first:
        text = by_first[text[-1]]
        stream += text[1:]
    return stream


@settings(max_examples=40)
@given(lengths_of, st.integers(1, 12), st.integers(1, 4), st.data())
def test_every_epoch_lays_all_documents_end_to_end(
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    seq_length: int,
    epochs: int,
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("samples")
    # Documents without an end-of-document token, so that every token occurs once.
    ends = np.cumsum(lengths)
    contents = [list(range(end - length, end)) for length, end in zip(lengths, ends, strict=True)]
    first = data.draw(st.integers(0, len(lengths) - 1))
    last = data.draw(st.integers(first + 1, len(lengths)))
    documents = document_range(write_dataset(folder / "d", contents), first, last)
    assert documents.tokens == sum(lengths[first:last])
    per_epoch = documents.samples_per_epoch(seq_length)
    assert per_epoch == max(0, (documents.tokens - 1) // seq_length)
    if not per_epoch:
        return
    texts = texts_of(open_samples(folder, documents, seq_length=seq_length, samples=epochs * per_epoch))
    assert all(len(text) == seq_length + 1 for text in texts)
    for epoch in range(epochs):
        stream = stream_of(texts[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert stream is not None
        assert len(stream) == per_epoch * seq_length + 1
        # Documents come whole and one after the other: a token is followed by the next, or by the beginning
        # of a document.
        begins = {content[0] for content in contents[first:last]}
        followers = {token: token + 1 for content in contents[first:last] for token in content[:-1]}
        for token, following in pairwise(stream):
            assert following == followers[token] if token in followers else following in begins
        assert documents.tokens - len(stream) < seq_length


def test_epochs_and_seeds_have_orders_of_their_own(tmp_path: Path) -> None:
    documents = document_range(write_dataset(tmp_path / "d", numbered_documents([5] * 40)), 0, 40)
    per_epoch = documents.samples_per_epoch(10)
    two_epochs = texts_of(open_samples(tmp_path, documents, seq_length=10, samples=2 * per_epoch))
    other_seed = texts_of(open_samples(tmp_path, documents, seq_length=10, samples=per_epoch, seed=2))
    assert two_epochs[:per_epoch] != two_epochs[per_epoch:]
    assert two_epochs[:per_epoch] != other_seed


def test_drawing_more_does_not_change_the_first(tmp_path: Path) -> None:
    documents = document_range(write_dataset(tmp_path / "d", numbered_documents([7, 3, 9, 4] * 5)), 0, 20)
    many = texts_of(open_samples(tmp_path, documents, seq_length=8, samples=200))
    for samples in (1, 14, 15, 60):
        assert texts_of(open_samples(tmp_path, documents, seq_length=8, samples=samples)) == many[:samples]


def test_one_document_gives_the_samples_of_megatron(tmp_path: Path) -> None:
    """Where nothing depends on the order of documents, megatron's own dataset draws the same samples."""
    from types import SimpleNamespace

    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = write_dataset(tmp_path / "d", [[*range(1, 100), EOD]])
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=8,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "theirs"),
        tokenizer=SimpleNamespace(vocab_size=1000, eod=EOD, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    theirs = GPTDataset(IndexedDataset(prefix), prefix, np.array([0], np.int32), None, Split.train, config)
    ours = open_samples(tmp_path, document_range(prefix, 0, 1), seq_length=8, samples=12)
    assert len(theirs) == len(ours) == 12
    expected = sorted(
        [*item["tokens"].tolist(), item["labels"][-1].item()] for item in (theirs[n] for n in range(12))
    )
    assert sorted(texts_of(ours)) == expected


def test_an_index_is_built_once_and_again_when_the_dataset_changes(tmp_path: Path) -> None:
    prefix = write_dataset(tmp_path / "d", numbered_documents([20] * 5))
    open_samples(tmp_path, document_range(prefix, 0, 5), seq_length=8, samples=10)
    built = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*")}
    assert len(built) == 4
    open_samples(tmp_path, document_range(prefix, 0, 5), seq_length=8, samples=12)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*/*")} == built
    write_dataset(tmp_path / "d", numbered_documents([20] * 5, first=300))
    texts = texts_of(open_samples(tmp_path, document_range(prefix, 0, 5), seq_length=8, samples=10))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    assert min(token for text in texts for token in text if token != EOD) >= 300


def test_an_index_that_cannot_be_written(tmp_path: Path) -> None:
    documents = document_range(write_dataset(tmp_path / "d", numbered_documents([20])), 0, 1)
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(
        ConfigError, match=r"cannot write the sample indices into .*cache \(.*\)\. Set data\.data_cache_path"
    ):
        open_samples(tmp_path, documents, seq_length=8, samples=1)


def test_an_interrupted_build_leaves_no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = document_range(write_dataset(tmp_path / "d", numbered_documents([20])), 0, 1)

    def full(file: ArrayFile, block: np.ndarray) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ArrayFile, "write", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            open_samples(tmp_path, documents, seq_length=8, samples=1)
    assert not list((tmp_path / "cache").iterdir())
    assert len(open_samples(tmp_path, documents, seq_length=8, samples=1)) == 1


def test_a_damaged_index(tmp_path: Path) -> None:
    documents = document_range(write_dataset(tmp_path / "d", numbered_documents([20])), 0, 1)
    open_samples(tmp_path, documents, seq_length=8, samples=1)
    starts = next((tmp_path / "cache").glob("*/starts.npy"))
    starts.write_bytes(starts.read_bytes()[:-3])
    with pytest.raises(
        ConfigError,
        match=r"starts\.npy: its content is not what was written\. Delete .* to have the sample indices "
        "built again",
    ):
        open_samples(tmp_path, documents, seq_length=8, samples=1)


@pytest.mark.parametrize("name", ["documents", "starts", "order"])
def test_whatever_is_in_an_index_a_sample_is_right_or_an_error(tmp_path: Path, name: str) -> None:
    """Other ranks and reading processes do not hash again; the file may change under them."""
    documents = document_range(write_dataset(tmp_path / "d", numbered_documents([7, 3, 12] * 4)), 0, 12)
    samples = open_samples(tmp_path, documents, seq_length=8, samples=10)
    path = next((tmp_path / "cache").glob(f"*/{name}.npy"))
    content, refusals = path.read_bytes(), []
    for value in (255, 127, 9):
        for at in range(128, len(content)):
            path.write_bytes(content[:at] + bytes([value]) + content[at + 1 :])
            for number in range(10):
                try:
                    assert samples[number]["tokens"].shape == (8,)
                except ConfigError as error:
                    refusals.append(str(error))
    assert len(refusals) > 20
    assert all(re.search(r"\.(npy|idx): ", refusal) for refusal in refusals)


@pytest.mark.parametrize("name", ["d.bin", "d.idx", "order.npy", "starts.npy", "documents.npy"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path, name: str, workers: int) -> None:
    """With memory maps this is a SIGBUS that kills the process."""
    documents = document_range(write_dataset(tmp_path / "d", numbered_documents([50] * 40)), 0, 40)
    samples = open_samples(tmp_path, documents, seq_length=8, samples=200, vocab_size=10_000)
    reading = build_data_iterator(
        samples,
        consumed_samples=0,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=workers,
        seed=1,
    )
    with closing(reading):
        next(reading)
        path = next(tmp_path.rglob(name))
        os.truncate(path, 150)
        with pytest.raises(ConfigError, match=rf"^\S*{name}: ends after 150 bytes, but bytes \d+ to \d+ are"):
            list(reading)


@pytest.mark.parametrize("vocab_size", [19, 30])
def test_tokens_outside_the_vocabulary(tmp_path: Path, vocab_size: int) -> None:
    documents = document_range(write_dataset(tmp_path / "d", [[*range(20)]]), 0, 1)
    samples = open_samples(tmp_path, documents, seq_length=19, samples=1, vocab_size=vocab_size)
    if vocab_size >= 20:
        assert samples[0]["labels"].max() == 19
        return
    with pytest.raises(
        ConfigError, match=r"d\.bin holds the token 19, but the vocabulary has 19\. Set model\.vocab_size"
    ):
        samples[0]


def test_samples_can_be_sent_to_another_process(tmp_path: Path) -> None:
    documents = document_range(write_dataset(tmp_path / "d", numbered_documents([50] * 20)), 0, 20)
    samples = open_samples(tmp_path, documents, seq_length=8, samples=100)
    pickled = pickle.dumps(samples)
    assert len(pickled) < 1000
    assert texts_of(pickle.loads(pickled)) == texts_of(samples)
    with pytest.raises(IndexError):
        samples[100]
    with pytest.raises(IndexError):
        samples[-1]


def test_more_documents_than_can_be_counted(tmp_path: Path) -> None:
    documents = DocumentRange(str(tmp_path / "d"), 0, 2**31, 2**40, "")
    with pytest.raises(ConfigError, match=r"d has at least 2147483648 documents, .*and blend them"):
        open_samples(tmp_path, documents, seq_length=8, samples=1)
