"""A loss that is not finite names the sample that it came from."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_ext.config import RunConfig
from megatron_ext.data.indexed import IndexedWriter
from megatron_ext.training import loop
from megatron_ext.training.step import NonFiniteLossError
from tests.megatron_ext.training.runs import tiny_run, train
from tests.ranks import run_on_ranks

BAD_TOKEN, BAD_DOCUMENT, AT = 96, 7, 30


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """12 documents of 40 tokens, one of which holds a token that occurs nowhere else."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, BAD_TOKEN, size=12 * 40).astype(np.uint16)
    tokens[BAD_DOCUMENT * 40 + AT] = BAD_TOKEN
    path = str(tmp_path / "corpus")
    with IndexedWriter(path, np.dtype(np.uint16)) as writer:
        writer.add(tokens, np.full(12, 40, np.int32))
        writer.close()
    return path


@pytest.mark.parametrize("micro_batch_size", [1, 2])
@pytest.mark.parametrize(("world_size", "pipeline"), [(2, 1), (2, 2)], ids=["dp2", "pp2"])
def test_the_document_of_the_first_such_sample_is_named(
    prefix: str, micro_batch_size: int, world_size: int, pipeline: int
) -> None:
    run = tiny_run(
        data={"mock": False, "data_path": [prefix], "split": "1,0,0"},
        train={"train_iters": 5, "micro_batch_size": micro_batch_size},
        parallel={"pipeline_model_parallel_size": pipeline},
    )
    with pytest.raises(NonFiniteLossError) as raised:
        run_on_ranks(world_size, train_with_a_broken_token, run)
    said = str(raised.value)
    assert "; 1 of 4 samples, the first of them number " in said
    number = int(said.partition("of them number ")[2].partition(",")[0])
    assert f"iteration {number // 4 + 1}: the loss is nan" in said
    ranks = "1" if pipeline == 2 else str(number % 4 // micro_batch_size % 2)
    assert f"ranks with such a loss: {ranks};" in said
    place = said.partition(f"number {number}, which begins in dataset {prefix}, ")[2].partition(")")[0]
    document, token = (int(word) for word in place.replace(",", "").split()[1::2])
    assert place == f"document {document}, token {token}"
    length = run.train.seq_length + 1
    if document == BAD_DOCUMENT:
        assert token <= AT < token + length
    else:  # it goes on in the next one
        assert 40 - token < length


def train_with_a_broken_token(run: RunConfig) -> int:
    build_stage = loop.build_stage

    def broken(*arguments, **options):
        stage = build_stage(*arguments, **options)
        if getattr(stage, "embedding", None) is not None:
            with torch.no_grad():
                stage.embedding.word_embeddings.weight[BAD_TOKEN] = torch.nan
        return stage

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_stage", broken)
        return train(run)
