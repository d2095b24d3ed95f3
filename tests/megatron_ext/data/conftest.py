from pathlib import Path

import pytest

from tests.megatron_ext.data.builders import train_sentencepiece


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
