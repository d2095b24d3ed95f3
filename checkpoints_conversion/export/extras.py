"""What a folder with weights and config.json still needs to be a model that others can use."""

import json
import logging
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from checkpoints_conversion.conversion_record import ConversionRecord
from checkpoints_conversion.description import ModelDescription
from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.export.measured import Measured
from checkpoints_conversion.export.model_card import model_card
from checkpoints_conversion.export.tokenizer import has_tokenizer, kind_of, write_tokenizer
from checkpoints_conversion.source_card import CARD_NAME, LICENSE_FILES, card_facts
from lckv.families.decoder import TokenIds
from lckv.families.lckv_llama import LCKV_LLAMA
from lckv.remote_code import modelling_files, write_modelling_files
from lckv.weights.json_file import read_json_object
from megatron_ext.atomic import write_file
from megatron_ext.data.tokenizers import load_tokenizer

logger = logging.getLogger(__name__)


def export_extras(
    folder: Path,
    description: ModelDescription,
    record: ConversionRecord,
    *,
    name: str | None = None,
    source_folder: Path | None = None,
    measured: Measured | None = None,
) -> list[str]:
    """Write tokenizer, generation_config.json, README.md and, for a model of type lckv-llama, the modelling
    files into `folder`.

    The tokenizer is `record.tokenizer`, else that of `source_folder` where it has one; without either there
    is none, and a warning. `source_folder` is also where generation_config.json and the files of the license
    come from; without it the card says of the license what the record does. `name` is what the card calls
    the model (default: the folder's name). Returns the names of the files written.

    Raises ConversionError where the tokenizer that the record names is missing or cannot be exported.
    """
    config_file = folder / "config.json"
    config = json.loads(config_file.read_bytes())
    tokenizer = _tokenizer(record, source_folder)
    names = [] if tokenizer is None else write_tokenizer(*tokenizer, folder)
    ids = {**description.token_ids}
    if tokenizer is not None and ids.get("eos_token_id") is None:
        ids["eos_token_id"] = load_tokenizer(tokenizer[0], str(tokenizer[1])).eod
    write_file(
        folder / "generation_config.json",
        json.dumps(_generation_config(ids, source_folder), indent=1).encode(),
    )
    with_code = config["model_type"] == LCKV_LLAMA.name
    if with_code:
        policy = description.compression.policy.name
        auto_map = write_modelling_files(folder, policy)
        write_file(config_file, json.dumps({**config, "auto_map": auto_map}, indent=2).encode())
        names += modelling_files(policy)
    names += _copy_license(source_folder, folder)
    card = model_card(
        name or folder.name,
        description,
        record,
        measured=measured,
        origin_card=_origin_card(source_folder, record, names),
        with_code=with_code,
    )
    write_file(folder / CARD_NAME, card.encode())
    return [*names, "generation_config.json", CARD_NAME]


def _copy_license(source_folder: Path | None, folder: Path) -> list[str]:
    """Returns the names of the files."""
    names = [name for name in LICENSE_FILES if source_folder and (source_folder / name).is_file()]
    for name in names:
        shutil.copyfile(cast(Path, source_folder) / name, folder / name)
    return names


def _origin_card(
    source_folder: Path | None, record: ConversionRecord, names: Collection[str]
) -> dict[str, str]:
    """What is known of the first model's page; without a link to a file that is not among `names`."""
    card, before = card_facts(source_folder), record
    while not card and before.previous is not None:
        before = before.previous
        card = dict(before.card or {})
    link = card.get("license_link")
    if link is not None and "://" not in link and link not in names:
        del card["license_link"]
    return card


def _tokenizer(record: ConversionRecord, source_folder: Path | None) -> tuple[str, Path] | None:
    """Kind and place of the model's tokenizer."""
    if record.tokenizer is not None:
        path = existing_tokenizer(record.tokenizer)
        return kind_of(path), path
    if source_folder is not None and has_tokenizer(source_folder):
        return "huggingface", source_folder
    logger.warning(
        "No tokenizer is known for this model: add one to the folder, or name one with --tokenizer."
    )
    return None


def existing_tokenizer(place: str) -> Path:
    """The folder or file `place`. Raises ConversionError where the tokenizer is not there."""
    path = Path(place)
    if not path.exists() or (path.is_dir() and not has_tokenizer(path)):
        raise ConversionError(
            f"the model's tokenizer was in {path}, where there is none now. Name a copy of it with "
            "--tokenizer, or export the model without one with --tokenizer none."
        )
    return path


def _generation_config(token_ids: TokenIds, source_folder: Path | None) -> dict[str, Any]:
    """That of the source where it has one, for it may say how the model is best sampled;
    else the special tokens."""
    path = source_folder / "generation_config.json" if source_folder is not None else None
    if path is not None and path.is_file():
        return read_json_object(path)
    return {"_from_model_config": True, **{name: ids for name, ids in token_ids.items() if ids is not None}}
