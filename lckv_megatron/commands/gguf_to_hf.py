"""Turns a GGUF file into a Hugging Face folder.

    lckv-megatron gguf-to-hf model.gguf out/model

The folder has the weights, dequantised to float32, the configuration and the tokenizer. transformers reads
the file, with the packages gguf and accelerate (extra `gguf`). The result can be converted and trained; a
quantised model stays what quantisation has made of it.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints_conversion.staging import staged
from megatron_ext.arguments import ProgramParser
from megatron_ext.console import exit_status, set_up_logging
from megatron_ext.errors import ConfigError

_MAGIC = b"GGUF"
_PACKAGES = ("gguf", "accelerate")
_LABELS = ("_model_name_or_path", "unk_token_id")
"""Fields that transformers copies from GGUF into a configuration in which they mean nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit status."""
    parser = ProgramParser("gguf-to-hf", __doc__)
    parser.add_argument("gguf", type=Path, help="the file to read")
    parser.add_argument("folder", type=Path, help="the folder to write, new or empty")
    options = parser.parse_args(argv)
    set_up_logging()
    return exit_status(lambda: convert(options.gguf, options.folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in the file `gguf` to the new folder `folder`.

    Raises ConfigError where a package is missing, the file is no GGUF file,
    or transformers cannot read its architecture.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"reading GGUF needs {' and '.join(missing)}: pip install -e '.[gguf]'.")
    try:
        with gguf.open("rb") as file:
            magic = file.read(len(_MAGIC))
    except OSError as error:
        raise ConfigError(f"{gguf} cannot be read: {error}") from error
    if magic != _MAGIC:
        raise ConfigError(f"{gguf} is no GGUF file: it begins with {magic!r} instead of {_MAGIC!r}.")
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {}
    if hasattr(transformers, "GgufConfig"):  # without it, transformers dequantises anyway
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with staged(folder) as unfinished:
        try:
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=torch.float32, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        except (ValueError, KeyError, NotImplementedError) as error:
            raise ConfigError(f"{gguf}: transformers cannot read it: {error}") from error
        for name in _LABELS:
            if hasattr(model.config, name):
                delattr(model.config, name)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


if __name__ == "__main__":
    sys.exit(main())
