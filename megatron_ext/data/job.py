"""What a preprocessing job is to make of which files."""

from dataclasses import dataclass

from megatron_ext.config import DataFormat
from megatron_ext.data.conversations import columns_of
from megatron_ext.data.parquet import Column
from megatron_ext.data.parts import Part
from megatron_ext.data.sources import Source
from megatron_ext.errors import ConfigError


@dataclass(frozen=True)
class PreprocessingJob:
    """What to make of which files."""

    sources: tuple[Source, ...]
    output_prefix: str
    tokenizer_type: str
    tokenizer_model: str
    json_keys: tuple[str, ...] = ("text",)
    """Keys of the JSON lines to take texts from. Of several keys each has its own dataset, PREFIX_KEY."""

    append_eod: bool = True
    """End every document with the tokenizer's end-of-document token."""

    workers: int = 1
    """Processes that tokenize; 1: this one does."""

    data_format: DataFormat = "pretraining"
    """What the records are. Conversations (chat) need one key, and a Hugging Face folder with a chat
    template, which also ends them."""

    shards: int | None = None
    """Split the output into (at most) so many shards of about equal size."""

    shard_text_bytes: int | None = None
    """Instead of `shards`: size of a shard in bytes of input text."""

    skip_bad_records: bool = False
    """Leave out records that are no valid documents, instead of stopping."""

    max_document_bytes: int = 1 << 26
    """Longest document, which bounds memory."""

    part: Part | None = None
    """Which part of a job of several machines this is; `sources` are those of the part."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """What is read of Parquet files."""
        return columns_of(self.json_keys[0]) if self.data_format == "chat" else self.json_keys

    def check(self) -> None:
        """Raises ConfigError for options that contradict each other or the input."""
        keys = " ".join(self.json_keys)
        is_chat = self.data_format == "chat"
        text = next((source for source in self.sources if source.format == "text"), None)
        if text is not None and (is_chat or len(self.json_keys) > 1):
            option = "--data-format chat" if is_chat else f"--json-keys {keys}"
            raise ConfigError(f"{option} needs JSON lines or Parquet files, but {text.path} is a text.")
        if not is_chat:
            return
        if self.tokenizer_type != "huggingface":
            raise ConfigError(
                f"--data-format chat with --tokenizer-type {self.tokenizer_type}: conversations need a "
                "Hugging Face folder (--tokenizer-type huggingface), whose chat template writes them."
            )
        if len(self.json_keys) > 1:
            raise ConfigError(
                f"--data-format chat with --json-keys {keys}: a record has one conversation; give one key."
            )
        if self.append_eod:
            raise ConfigError(
                "--data-format chat with --append-eod: the chat template ends a conversation; leave that "
                "option out."
            )
