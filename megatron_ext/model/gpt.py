"""The language model: Megatron's embedding and output layer around `SharedKVBlock`.

Parameter names are those of Megatron's GPTModel; a plain map has exactly its parameters.
"""

from dataclasses import replace
from functools import partial

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor

from lckv.attention.visibility import Documents
from lckv.losses.backends import Choice as LossChoice
from lckv.losses.linear_distillation import Lesson, linear_distillation
from lckv.losses.token_losses import LinearCrossEntropy, TokenLosses, Vocabulary
from lckv.policies.base import RowPart, TokenContext
from lckv.rope import RotaryEmbedding, Rotation, Turn, rotation
from megatron_ext.model.block import SharedKVBlock
from megatron_ext.model.contexts import LayerContext
from megatron_ext.model.linear import OutputLinear
from megatron_ext.model.policy_statistics import PolicyInputs, PolicyReport
from megatron_ext.model.stages import StageCall
from megatron_ext.model.transformer_config import SharedKVTransformerConfig

_NOTHING = PolicyInputs()


class SharedKVGPTModel(LanguageModule):
    """One pipeline stage of a decoder with shared keys and values."""

    def __init__(
        self,
        config: SharedKVTransformerConfig,
        submodules: TransformerBlockSubmodules,
        *,
        rope: RotaryEmbedding,
        vocab_size: int,
        padded_vocab_size: int,
        pre_process: bool,
        post_process: bool,
        share_embeddings_and_output_weights: bool,
        loss: LossChoice,
        recompute_num_layers: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """`vocab_size` is the true one; ids from it to `padded_vocab_size` are padding, which never receives
        probability."""
        super().__init__(config=config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        self.vocab_size, self.padded_vocab_size = vocab_size, padded_vocab_size
        self.loss = loss
        self.rope = rope
        self._frequencies: tuple[int, Tensor] | None = None
        self.input_is_frozen = False
        """Whether the embedding is not trained, but what comes behind it is."""
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded_vocab_size,
                max_sequence_length=0,
                position_embedding_type="rope",
                tp_group=self.pg_collection.tp,
            )
        self.decoder = SharedKVBlock(
            config, submodules, pre_process, post_process, self.pg_collection, recompute_num_layers
        )
        if post_process:
            self.output_layer = OutputLinear(
                config.hidden_size,
                padded_vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and share_embeddings_and_output_weights,
                tp_group=self.pg_collection.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Called by Megatron's schedules with what the previous stage sent."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        labels: Tensor | None = None,
        documents: Documents | None = None,
        policy: PolicyInputs = _NOTHING,
        call: StageCall | None = None,
        *,
        loss_mask: Tensor | None = None,
        lesson: Lesson | None = None,
    ) -> tuple[Tensor | TokenLosses, PolicyReport]:
        """tokens, position_ids and labels are int64 [b, s]; with context parallelism those that this rank has
        of each row. `documents` are those of whole rows. `call`: one visit of several to this stage.
        `loss_mask` float [b, s]: the weight of each token in the total loss; default: 1. `lesson`: what a
        teacher makes of the tokens, for a loss that is learned from it.

        Returns, with what the KV policy did: on the last stage the losses of tokens, float32 [b, s] in nats,
        and their total, through which gradients go, or without labels this rank's part of the logits [b, s,
        padded vocabulary / TP]; on other stages what the next stage receives.

        Under Megatron's data parallelism a forward with gradients adds that of the output weight to its sums
        at once: the total's gradient must be 1.
        """
        hidden_states, report = self.states(tokens, position_ids, documents, policy, call)
        if (self.decoder.visit if call is None else call.visit).sends is not None:
            return hidden_states, report
        auxiliary = self.decoder.statistics.auxiliary_loss(report.sums, policy.progress)
        report = replace(report, auxiliary_loss=auxiliary)
        if labels is None:
            return self.logits(hidden_states).transpose(0, 1), report
        return self._loss(hidden_states, labels, loss_mask, lesson), report

    def states(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        documents: Documents | None,
        policy: PolicyInputs,
        call: StageCall | None = None,
    ) -> tuple[Tensor, PolicyReport]:
        """As `forward`, but of the last stage the hidden states under its output layer, [s / shards, b,
        hidden], and no auxiliary loss."""
        micro_batch_size, seq_length = tokens.shape
        visit = self.decoder.visit if call is None else call.visit
        enters = visit.receives is None
        embedded = self.embedding(input_ids=tokens, position_ids=position_ids) if enters else None
        if embedded is not None and self.input_is_frozen and torch.is_grad_enabled():
            embedded.requires_grad_()  # without, recomputed layers would return nothing to differentiate
        context = self._context(position_ids, documents, policy)
        states, report = self.decoder(embedded, context, policy.row_seeds, seq_length, micro_batch_size, call)
        return states, report

    def _context(
        self, position_ids: Tensor, documents: Documents | None, policy: PolicyInputs
    ) -> LayerContext:
        """What the layers know of the tokens at positions [b, s]."""
        group, positions = self.decoder.context_group, position_ids.transpose(0, 1)
        length = len(positions) * group.chunks.ranks
        tokens = TokenContext(
            self._turn(positions, length),
            documents,
            counted=None if policy.counted is None else policy.counted.transpose(0, 1),
            training=self.training,
            progress=policy.progress,
            positions=positions,
        )
        rows = policy.chunk_rows
        if rows is None:
            if not group.is_alone:
                raise ValueError("policy.chunk_rows is missing; with context parallelism it must be given.")
            return LayerContext(tokens)
        part = RowPart(rows.reach, rows.begins, rows.counted_in_row, group.carried)
        chunks = replace(
            tokens,
            rotate=self._turn(rows.position_ids, length),
            documents=None,
            counted=rows.counted,
            positions=rows.position_ids,
            part=part,
        )
        return LayerContext(tokens, chunks)

    def angles(self, positions: Tensor, seq_length: int) -> Rotation:
        """RoPE at `positions` of rows of `seq_length` tokens, whatever documents are in them.

        Frequencies are made once for a length, since factors of a scaling come from the host. They are no
        buffer: bfloat16 conversion of the module must not reach them.
        """
        if self._frequencies is None or (self.rope.follows_length and self._frequencies[0] != seq_length):
            self._frequencies = seq_length, self.rope.frequencies(seq_length, device=positions.device)
        return rotation(positions, self._frequencies[1], self.rope.attention_factor)

    def _turn(self, positions: Tensor, seq_length: int) -> Turn:
        """RoPE at positions [s, b] of rows of `seq_length` tokens, of [s, b, any heads, d]."""
        return Turn(self.angles(positions[:, :, None], seq_length), self.config.operators.rope.function)

    def _loss(
        self, hidden_states: Tensor, labels: Tensor, loss_mask: Tensor | None, lesson: Lesson | None
    ) -> TokenLosses:
        """Of hidden states [s / shards, b, hidden], labels and mask [b, s]: losses [b, s] and their total."""
        rows, length = labels.shape
        targets = labels.transpose(0, 1).flatten()
        token_weights = None if loss_mask is None else loss_mask.transpose(0, 1).flatten()

        def loss(states: Tensor, weight: Tensor, sums: Tensor | None) -> TokenLosses:
            group = self.pg_collection.tp
            function: LinearCrossEntropy = self.loss.loss
            if lesson is not None:
                function = partial(
                    linear_distillation,
                    teacher=lesson.teacher,
                    terms=lesson.terms,
                    chunk_size=self.loss.chunk_size,
                )
            return function(
                states.flatten(0, 1),
                weight,
                targets,
                token_weights=token_weights,
                vocabulary=Vocabulary(self.vocab_size, group.rank() * len(weight), group),
                weight_gradient=sums,
            )

        done: TokenLosses = self.output_layer(
            hidden_states,
            weight=self._output_weight(),
            loss=loss,
            adds_gradient=self.loss.adds_weight_gradient or lesson is not None,
        )
        losses, objective = (it.view(length, rows).transpose(0, 1) for it in (done.losses, done.objective))
        return TokenLosses(losses, done.total, objective)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """This rank's part of the logits, [s, b, padded vocabulary / TP], of hidden states
        [s / shards, b, hidden]; padding is as low as the dtype goes."""
        logits, _ = self.output_layer(hidden_states, weight=self._output_weight())
        first = self.pg_collection.tp.rank() * logits.shape[-1]
        true = min(max(self.vocab_size - first, 0), logits.shape[-1])
        if true < logits.shape[-1]:
            logits[..., true:] = torch.finfo(logits.dtype).min
        return logits

    def output_weight(self) -> Tensor:
        """Of the last stage: [padded vocabulary / TP, hidden], this rank's rows."""
        shared = self._output_weight()
        weight: Tensor = self.output_layer.weight if shared is None else shared
        return weight

    def _output_weight(self) -> Tensor | None:
        """That of the embedding, where they share it; None: the output layer's own."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
