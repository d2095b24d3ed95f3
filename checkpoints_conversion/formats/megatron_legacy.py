"""Checkpoints in Megatron's older layout, in which models of KV policies have been published.

    FOLDER/latest_checkpointed_iteration.txt            the number of the newest iteration, or "release"
    FOLDER/iter_0002000/mp_rank_00/model_optim_rng.pt   tensor-parallel rank 0
    FOLDER/iter_0002000/mp_rank_00_001/...              the same of pipeline stage 1

A file is a dictionary that torch.save has pickled:
the run's `args`, and its part of the weights under `model`.
"""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from checkpoints_conversion.errors import ConversionError
from checkpoints_conversion.formats.megatron import canonical_name, without_padding
from checkpoints_conversion.formats.megatron_legacy_arguments import Arguments, describe
from checkpoints_conversion.formats.megatron_legacy_file import FILE_NAME, RankFile
from checkpoints_conversion.formats.pieces import Piece, join_rows
from lckv.plain_files import read_plain
from lckv.weights.checks import check_tensors
from lckv.weights.tensors import TensorInfo

_TRACKER_NAME = "latest_checkpointed_iteration.txt"
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?")
_LAYER = re.compile(r"(?<=^decoder\.layers\.)\d+(?=\.)")
_LEGACY_NAMES = (
    # Models built before Megatron-core.
    (r"language_model\.embedding\.word_embeddings\.weight", "embedding.word_embeddings.weight"),
    (r"language_model\.output_layer\.weight", "output_layer.weight"),
    (r"language_model\.(?:encoder|transformer)\.final_(?:layer)?norm\.weight",
     "decoder.final_layernorm.weight"),
    (r"language_model\.(?:encoder|transformer)\.layers\.(\d+)\.input_(?:layer)?norm\.",
     r"decoder.layers.\1.input_layernorm."),
    (r"language_model\.(?:encoder|transformer)\.layers\.(\d+)\.post_attention_(?:layer)?norm\.",
     r"decoder.layers.\1.pre_mlp_layernorm."),
    (r"language_model\.(?:encoder|transformer)\.layers\.(\d+)\.", r"decoder.layers.\1."),
    (r"\.self_attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.self_attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
)  # fmt: skip
_SPLIT_BY_COLUMNS = (".linear_proj.weight", ".linear_fc2.weight")
_SPLIT_BY_ROWS = ("word_embeddings.weight", "output_layer.weight", ".linear_qkv.weight", ".linear_qkv.bias")


class LegacyCheckpoint:
    """A model's weights under canonical names (a TensorSource),
    tensor-parallel ranks and pipeline stages joined."""

    def __init__(
        self, path: Path, *, vocab_size: int | None = None, given: Mapping[str, object] | None = None
    ) -> None:
        """`path` is the folder of one iteration, or the one with `latest_checkpointed_iteration.txt`.

        `vocab_size`, the true one, and the arguments `given` by name go before what the file says. Raises
        ConversionError where files of ranks are missing or refused,
        or where the model is not one that can be converted.
        """
        self.path = _find_folder(Path(path))
        """The folder of the iteration."""

        self._ranks = _open_ranks(self.path)
        arguments = self._arguments(given or {})
        self._parts = _collect(self._ranks, arguments)
        embedding = self._parts.get("embedding.word_embeddings.weight")
        if embedding is None:
            raise ConversionError(
                f"{self.path}: the first pipeline stage has no embedding; this is no language model."
            )
        self.description = describe(
            arguments,
            dtype=embedding[0].dtype,
            padded_vocab_size=embedding[0].shape[0],
            vocab_size=vocab_size,
        )
        """The model, with the KV policy that it was trained with."""

        expected = self.description.expected_tensors()
        infos = {name: without_padding(name, info, expected) for name, (info, _) in self._parts.items()}
        check_tensors(infos, expected, self.path)
        self._infos = {name: infos[name] for name in expected}

    @property
    def files(self) -> list[str]:
        """The files of weights, relative to `path`."""
        return sorted(file.path.relative_to(self.path).as_posix() for file in self._ranks.values())

    @property
    def iteration(self) -> int:
        """Optimizer steps done."""
        iteration = self._ranks[0, 0].content.get("iteration", 0)
        return iteration if isinstance(iteration, int) else 0

    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor by its name, from the embedding to the output layer."""
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """As `TensorSource.read`; vocabulary padding is left out."""
        return join_rows(self._parts[name][1], self._infos[name], rows)

    def _arguments(self, given: Mapping[str, object]) -> Arguments:
        content = self._ranks[0, 0].content
        arguments, version = self._ranks[0, 0].arguments, content.get("checkpoint_version")
        where = self._ranks[0, 0].path
        if arguments is None:
            raise ConversionError(
                f"{where} holds no arguments of a run (`args`); they are needed to know the model."
            )
        if version != 3.0:
            raise ConversionError(
                f"{where}: checkpoint_version is {version}; it must be 3.0, earlier ones have queries, keys "
                "and values in another order."
            )
        known = Arguments({**vars(arguments), **given}, where)
        sizes = (known.integer("tensor_model_parallel_size"), known.integer("pipeline_model_parallel_size"))
        expected = {(tensor, stage) for tensor in range(sizes[0]) for stage in range(sizes[1])}
        if missing := sorted(expected - self._ranks.keys()):
            ranks = ", ".join(
                f"tensor-parallel rank {tensor} of stage {stage}" for tensor, stage in missing[:5]
            )
            more = " ..." if len(missing) > 5 else ""
            raise ConversionError(
                f"{self.path}: the files of {len(missing)} of {len(expected)} ranks are missing: "
                f"{ranks}{more}."
            )
        if extra := sorted(self._ranks.keys() - expected):
            raise ConversionError(
                f"{self.path}: {self._ranks[extra[0]].path.parent.name} belongs to no rank of "
                f"tensor_model_parallel_size {sizes[0]} x pipeline_model_parallel_size {sizes[1]}; remove it."
            )
        return known


def _find_folder(path: Path) -> Path:
    tracker = path / _TRACKER_NAME
    if not any(_rank_folders(path)) and tracker.is_file():
        name = read_plain(tracker)[:40].decode(errors="replace").strip()
        path = path / (f"iter_{int(name):07d}" if name.isascii() and name.isdigit() else "release")
    if not any(_rank_folders(path)):
        raise ConversionError(
            f"{path} holds no folders mp_rank_00 and so on; give the folder of one iteration, or the one "
            f"with {_TRACKER_NAME}."
        )
    return path


def _rank_folders(path: Path) -> Iterator[Path]:
    return path.glob("mp_rank_*")


def _open_ranks(folder: Path) -> dict[tuple[int, int], RankFile]:
    """The files by tensor-parallel rank and pipeline stage."""
    ranks = {}
    for path in sorted(_rank_folders(folder)):
        match = _RANK_FOLDER.fullmatch(path.name)
        if match is None:
            raise ConversionError(
                f"{path}: of such names mp_rank_00 and mp_rank_00_000 are known; mixtures of experts are not "
                "converted."
            )
        ranks[int(match[1]), int(match[2] or 0)] = RankFile(path / FILE_NAME)
    if (0, 0) not in ranks:
        raise ConversionError(f"{folder}: mp_rank_00 is missing.")
    return ranks


_Parts = dict[str, tuple[TensorInfo, list[Piece]]]


def _collect(ranks: Mapping[tuple[int, int], RankFile], arguments: Arguments) -> _Parts:
    """Every tensor by its canonical name, and the pieces that it is made of."""
    tensor_ranks = arguments.integer("tensor_model_parallel_size")
    stages = arguments.integer("pipeline_model_parallel_size")
    layers_per_stage = arguments.integer("num_layers") // stages
    tied = not arguments.flag("untie_embeddings_and_output_weights")
    parts: _Parts = {}
    for stage in range(stages):
        files = [ranks[rank, stage] for rank in range(tensor_ranks)]
        for key in dict.fromkeys(key for file in files for key in file.tensors):
            name = _canonical_name(key, stage * layers_per_stage)
            if tied and name == "output_layer.weight":  # the last stage's copy of the embedding
                continue
            if name in parts:
                raise ConversionError(
                    f"{files[0].path}: {key} is there twice, on two pipeline stages or under two names."
                )
            parts[name] = _join(name, key, files)
    return parts


def _canonical_name(key: str, first_layer: int) -> str:
    for pattern, name in _LEGACY_NAMES:
        key = re.sub(pattern, name, key)
    return canonical_name(_LAYER.sub(lambda match: str(int(match[0]) + first_layer), key))


def _join(name: str, key: str, files: list[RankFile]) -> tuple[TensorInfo, list[Piece]]:
    tensors = {file.path: file.tensors.get(key) for file in files}
    shapes = {None if tensor is None else tensor.info.shape for tensor in tensors.values()}
    (shape, *others) = shapes
    if others or shape is None or not shape:
        shown = ", ".join(
            f"{path.parent.name} {'nothing' if part is None else list(part.info.shape)}"
            for path, part in tensors.items()
        )
        raise ConversionError(
            f"{files[0].path.parent.parent}: the parts of {key} do not fit together: {shown}."
        )
    dtype, ranks, rest = files[0].tensors[key].info.dtype, len(files), shape[1:]
    if name.endswith(_SPLIT_BY_COLUMNS):
        pieces = [_piece(file, key, (0, rank * shape[1]), shape) for rank, file in enumerate(files)]
        return TensorInfo((shape[0], ranks * shape[1]), dtype), pieces
    if name.endswith(
        ".linear_fc1.weight"
    ):  # every rank has its part of the gate above its part of what the gate multiplies
        half = (shape[0] // 2, *rest)
        pieces = [
            _piece(file, key, ((part * ranks + rank) * half[0], *[0] * len(rest)), half, first=part * half[0])
            for part in range(2)
            for rank, file in enumerate(files)
        ]
        return TensorInfo((ranks * shape[0], *rest), dtype), pieces
    if name.endswith(_SPLIT_BY_ROWS):
        pieces = [
            _piece(file, key, (rank * shape[0], *[0] * len(rest)), shape) for rank, file in enumerate(files)
        ]
        return TensorInfo((ranks * shape[0], *rest), dtype), pieces
    return TensorInfo(shape, dtype), [_piece(files[0], key, (0,) * len(shape), shape)]


def _piece(
    file: RankFile, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...], *, first: int = 0
) -> Piece:
    return Piece(offsets, sizes, partial(file.copy_rows, key, first))
