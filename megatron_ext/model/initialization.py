"""Initial weights that do not depend on the layout: every parameter is drawn whole from a seed of its own,
then sharded.

A run with TP=2 x PP=2 therefore starts from the weights of the same run on one process.
"""

import re
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lckv.sharing.mixing import initial_weight
from megatron_ext.model.gpt import SharedKVGPTModel

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"
_GUESS = "linear_first_guess.weight"
_MIX = (".key_weight", ".value_weight")


def global_parameters(model: SharedKVGPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The stage's parameters under names that count layers from the bottom of the whole model."""
    numbers = list(model.decoder.places)
    for name, parameter in model.named_parameters():
        match = _LAYER.match(name)
        number = numbers[int(match[1])] if match else 0
        yield (f"decoder.layers.{number}.{name[match.end() :]}" if match else name), parameter


@torch.no_grad()
def initialize_weights(model: SharedKVGPTModel, *, seed: int, std: float) -> None:
    """Fill all parameters in place: matrices from N(0, std^2), those that write to the residual stream with
    std divided by sqrt(2 * num_layers) (GPT-2); norms 1, biases 0, rows of vocabulary padding 0, first
    guesses 0, a KV policy's own weights 0; weights that mix as if nothing were mixed in."""
    projection = model.config.compression.policy.traits.projection
    zeros = (_GUESS,) if projection is None else (_GUESS, f".{projection.name}.weight")
    factor = model.config.compression.mix_scaling_factor
    for name, parameter in global_parameters(model):
        if name.endswith(_MIX):
            parameter.copy_(initial_weight(factor))
            continue
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        if name.endswith(zeros):  # keys and values that published models begin with; no decisions
            parameter.fill_(0.0)
            continue
        residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        scale = std / (2 * model.config.num_layers) ** 0.5 if residual else std
        if name == _OUTPUT and model.share_embeddings_and_output_weights:
            name = _EMBEDDING
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed((seed << 32) + zlib.crc32(name.encode()))
        whole = torch.empty(_whole_shape(model, name, parameter), device=parameter.device)
        whole.normal_(0.0, scale, generator=generator)
        parameter.copy_(shard(model, name, whole))


def _whole_shape(model: SharedKVGPTModel, name: str, parameter: Tensor) -> list[int]:
    shape = list(parameter.shape)
    if name in (_EMBEDDING, _OUTPUT):
        return [model.vocab_size, *shape[1:]]
    dim = getattr(parameter, "partition_dim", -1)
    if dim >= 0:
        shape[dim] *= model.pg_collection.tp.size()
    return shape


def shard(model: SharedKVGPTModel, name: str, whole: Tensor) -> Tensor:
    """This tensor-parallel rank's part of a whole parameter
    (of the embedding and output layer: its true rows)."""
    ranks, rank = model.pg_collection.tp.size(), model.pg_collection.tp.rank()
    if name in (_EMBEDDING, _OUTPUT):
        padding = whole.new_zeros(model.padded_vocab_size - len(whole), *whole.shape[1:])
        return torch.cat((whole, padding)).chunk(ranks)[rank]
    if name.endswith("linear_fc1.weight"):  # gate above up, each split over the ranks
        return torch.cat([half.chunk(ranks)[rank] for half in whole.chunk(2)])
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return whole.chunk(ranks, dim=1)[rank]
    if name.endswith(("linear_qkv.weight", "linear_qkv.bias", "linear_q.weight", "linear_q.bias", _GUESS)):
        return whole.chunk(ranks)[rank]
    return whole
