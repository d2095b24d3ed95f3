import json
import multiprocessing
from pathlib import Path

import pytest

from megatron_ext.data import encoding
from megatron_ext.data.encoding import EncodedStream, EncodingSettings, encode_records
from megatron_ext.data.records import BadRecordError
from megatron_ext.data.sources import RecordReader, find_sources


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordReader:
    monkeypatch.setattr(encoding, "_BATCH_RECORDS", 5)
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": f"hello {number}"}) + "\n" for number in range(500)))
    return RecordReader(find_sources([str(path)]))


def encode(
    reader: RecordReader, model: Path, workers: int, *, key: str = "text", shard: int | None = None
) -> EncodedStream:
    settings = EncodingSettings("sentencepiece", str(model), (key,), True, False)
    return encode_records(reader, settings, workers=workers, shard_text_bytes=shard)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_reader_is_never_far_ahead(reader: RecordReader, sentencepiece_model: Path, workers: int) -> None:
    stream = encode(reader, sentencepiece_model, workers)
    ahead = [reader.position.text_bytes - stretch.end.text_bytes for stretch, _ in stream]
    batch_bytes = 5 * len('{"text": "hello 123"}\n')
    assert len(ahead) == 101
    assert max(ahead) <= (1 if workers == 1 else 2 * workers) * batch_bytes


def test_shards_end_at_records_near_the_multiples_of_their_size(
    reader: RecordReader, sentencepiece_model: Path
) -> None:
    size = 1000
    stretches = [stretch for stretch, _ in encode(reader, sentencepiece_model, 1, shard=size)]
    ends = [stretch.end.text_bytes for stretch in stretches if stretch.closes_shard]
    assert [end // size for end in ends[:-1]] == list(range(1, len(ends)))
    assert all(end % size < 25 for end in ends[:-1])
    assert [stretch.final for stretch in stretches] == [False] * (len(stretches) - 1) + [True]
    assert stretches[-1].closes_shard


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_record_is_the_error(
    reader: RecordReader, sentencepiece_model: Path, workers: int
) -> None:
    with pytest.raises(BadRecordError, match=r"corpus\.jsonl:1: no key 'body'"):
        list(encode(reader, sentencepiece_model, workers, key="body"))
    assert reader.position.line < 500


def test_the_death_of_a_worker_is_an_error(reader: RecordReader, sentencepiece_model: Path) -> None:
    before = multiprocessing.active_children()
    stream = encode(reader, sentencepiece_model, 2)
    next(stream)
    for process in multiprocessing.active_children():
        if process not in before:
            process.kill()
    with pytest.raises(
        RuntimeError, match="a tokenizing process died, perhaps for lack of memory; use fewer --workers"
    ):
        list(stream)
