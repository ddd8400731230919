"""MosaicBERT: BERT with ALiBi, gated linear units and unpadding, under Hugging Face's names.

The models; their layers are in bert_encoder.py. Architecture: Portes et al., 2023, MosaicBERT, arXiv 2312.17482,
section 2.

    users      ids, mask (B, S) -unpad-> ids (T,) -embeddings, L layers-> (T, D) -pad-> (B, S, D), logits (B, S, V)
    training   ids (T,), labels (M,)              -embeddings, L layers-> (M, D) -head-> loss

The model computes only the T tokens, one sequence after another, without padding. With labels, the last layer and the
head compute only the M masked ones (``rows``).

Letters: B sequences, S padded length, T tokens of the batch, M masked tokens, D hidden size, N heads, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .attention import AlibiSlopes, resolve
from .attention_tiles import tile_tables
from .bert_encoder import BertEmbeddings, BertEncoder, BertPooler, LayerNorm
from .bert_padding import Layout, PaddedLayout, from_rows, to_rows, unpad_input, unpad_layout
from .configuration_bert import MosaicBertConfig
from .graphs import in_exported_graph, in_graph, in_trace
from .masked_lm_loss import (
    IGNORED,
    masked_lm_loss,
    masked_lm_loss_in_place,
    mean_cross_entropy,
    mean_loss,
    owns_output,
    wide,
)

# isort: split
# transformers' loader copies the files that this one names, not those that they name in turn.
from .cross_entropy_triton import fused_forward as _  # noqa: F401
from .flash_attn_triton import flash_attn as _  # noqa: F401, F811
from .geglu_triton import geglu as _  # noqa: F401, F811
from .layer_norm_triton import layer_norm as _  # noqa: F401, F811
from .torch_ops import dropout as _  # noqa: F401, F811
from .triton_common import draw_key as _  # noqa: F401, F811


@dataclass
class UnpaddedMaskedLMOutput(MaskedLMOutput):
    """The loss of an unpadded batch, and sums for loss and accuracy that add up exactly over batches."""

    loss_sum: Tensor | None = None
    """() fp32, cross entropy summed over the masked tokens."""
    correct: Tensor | None = None
    """() int64, masked tokens whose highest logit is the label."""
    count: Tensor | None = None
    """() int64, masked tokens (M)."""


# ----------------------------------------------------------------------------------------------------------------------
# BertModel
# ----------------------------------------------------------------------------------------------------------------------


class BertPreTrainedModel(PreTrainedModel):
    """What all MosaicBERTs share: config, initial weights, gradient checkpointing.

    Each class sets ``_auto_class``: save_pretrained then also saves this source, and the folder needs only torch and
    transformers to load.
    """

    config_class = MosaicBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True  # transformers' Trainer then gives ``num_items_in_batch``
    _no_split_modules = ["BertLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range) for matrices, 0 for biases, 1 and 0 for LayerNorms, as BERT."""
        # Use nn.init only: transformers 5 patches its functions to keep weights that were loaded.
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, AlibiSlopes):
            module.fill(module.slopes.device)

    def _returned(self, output: Any, return_dict: bool | None) -> Any:
        """``output``, or a tuple of its fields if ``return_dict`` is False.

        By default the config's, and False if that says ``torchscript``, or in torch.jit.trace, which takes no dicts.
        """
        if return_dict is None:
            torchscript = getattr(self.config, "torchscript", False)  # transformers 5 has no default
            return_dict = self.config.return_dict and not (torchscript or in_trace())
        return output if return_dict else output.to_tuple()


def checked_mask(
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    head_mask: Tensor | None,
    inputs_embeds: Tensor | None,
    labels: Tensor | None = None,
) -> Tensor:
    """The attention mask (B, S) as bool, true without one, after a check of a padded batch; ``labels`` are (B, S).

    Raises:
        ValueError: ``position_ids`` or ``head_mask`` is given; both or none of ``input_ids`` and ``inputs_embeds``; a
            tensor of another shape; a mask with other values than 0 and 1. In a graph, only the first two.
    """
    for name, value in {"position_ids": position_ids, "head_mask": head_mask}.items():
        if value is not None:
            raise ValueError(f"MosaicBERT takes no {name}: it has no position embeddings, and masks no heads")
    given = inputs_embeds if input_ids is None else input_ids
    if given is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("expected either input_ids or inputs_embeds")
    if not in_graph():
        dimensions = 2 if inputs_embeds is None else 3
        if given.dim() != dimensions or 0 in given.shape[1:]:
            name, shape = ("input_ids", "(B, S)") if inputs_embeds is None else ("inputs_embeds", "(B, S, D)")
            raise ValueError(f"{name}: expected shape {shape} with S of 1 or more, got {tuple(given.shape)}")
        same = {"attention_mask": attention_mask, "token_type_ids": token_type_ids, "labels": labels}
        for name, value in same.items():
            if value is not None and value.shape != given.shape[:2]:
                shapes = f"{tuple(given.shape[:2])}, got {tuple(value.shape)}"
                raise ValueError(f"{name}: expected the shape of the batch, (B, S) = {shapes}")
        if attention_mask is not None and attention_mask.dtype != torch.bool:
            if not bool(((attention_mask == 0) | (attention_mask == 1)).all()):
                raise ValueError("attention_mask: expected 1 at tokens and 0 at padding, got other values")
    if attention_mask is None:
        return torch.ones(given.shape[:2], dtype=torch.bool, device=given.device)
    return attention_mask.bool()


class BertModel(BertPreTrainedModel):
    """The encoder, with BERT's pooler on top unless ``add_pooling_layer`` is False."""

    _auto_class = "AutoModel"

    def __init__(self, config: MosaicBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        self.encoder = BertEncoder(config)
        self.pooler = BertPooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.word_embeddings = value

    def layout(self, mask_or_lengths: Tensor) -> Layout:
        """``unpad_layout`` of a padded batch, with tile tables if this model's attention is triton."""
        layout = unpad_layout(mask_or_lengths)
        if resolve(self.config.attention, device_type=mask_or_lengths.device.type) != "triton":
            return layout
        return replace(layout, tables=tile_tables(layout))

    def encode(
        self,
        input_ids: Tensor | None,
        layout: Layout | PaddedLayout,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The unpadded model: ids (T,) or embeddings (T, D) to the L + 1 states, (T, D) each.

        With ``rows`` (M,) the last layer computes only what these tokens need; the last state is (M, D).
        """
        return self.encoder(self.embeddings(input_ids, token_type_ids, inputs_embeds), layout, rows)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPooling | tuple:
        """Padded in, padded out.

        Args:
            input_ids: (B, S); or give ``inputs_embeds`` (B, S, D).
            attention_mask: (B, S), 1 at tokens, 0 at padding, of any dtype; None means no padding. Padding may be left
                or right: ALiBi's distances count tokens only.
            token_type_ids: (B, S); None means segment 0.
            output_hidden_states: also return the embeddings' output and every layer's, (B, S, D) each.
            output_attentions: also return every layer's attention weights before dropout, (B, N, S, S) each. They are
                computed separately, by the definition: the kernels never store them.

        Returns:
            ``last_hidden_state`` (B, S, D), zero at padding, and ``pooler_output`` (B, D) or None.

        Raises:
            ValueError: as ``checked_mask``.
        """
        mask = checked_mask(input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        B, S = mask.shape
        # In an exported graph, shapes must not depend on the mask's values.
        layout = PaddedLayout(mask) if in_exported_graph() else self.layout(mask)
        ids, segments, embeds = (to_rows(x, layout) for x in (input_ids, token_type_ids, inputs_embeds))
        states = self.encode(ids, layout, segments, embeds)
        last, pooled = from_rows(states[-1], layout, B, S), None
        if self.pooler is not None:
            # The first token, also with padding on the left. An empty sequence pools a zero vector.
            first = mask.int().argmax(dim=1)
            pooled = self.pooler(last[torch.arange(B, device=last.device), first])
        hidden_states, attentions = None, None
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            hidden_states = tuple(from_rows(x, layout, B, S) for x in states)
        if self.config.output_attentions if output_attentions is None else output_attentions:
            slopes, layers = self.encoder.alibi(last.device), self.encoder.layer
            attentions = tuple(
                layer.attention.self.weights(from_rows(x, layout, B, S), mask, slopes)  # pyright: ignore
                for layer, x in zip(layers, states[:-1], strict=True)
            )
        output = BaseModelOutputWithPooling(
            last_hidden_state=last,  # pyright: ignore[reportArgumentType]
            pooler_output=pooled,  # pyright: ignore[reportArgumentType]
            hidden_states=hidden_states,
            attentions=attentions,
        )
        return self._returned(output, return_dict)


# ----------------------------------------------------------------------------------------------------------------------
# Models with heads
# ----------------------------------------------------------------------------------------------------------------------


class BertPredictionHeadTransform(nn.Module):
    """LayerNorm(gelu(dense(x))), (M, D)."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class BertLMPredictionHead(nn.Module):
    """Logits over the vocabulary, (M, D) -> (M, V). The decoder's weight is tied to the word embeddings."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.transform = BertPredictionHeadTransform(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform(x))


class BertOnlyMLMHead(nn.Module):
    """The head; this wrapper gives it its name in checkpoints, ``cls.predictions``."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.predictions = BertLMPredictionHead(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.predictions(x)


class BertForMaskedLM(BertPreTrainedModel):
    """MosaicBERT with its masked-language-model head."""

    # transformers 5 expects a dict, parameter to what it is tied to; transformers 4 reads only the keys.
    _tied_weights_keys = {"cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight"}
    _auto_class = "AutoModelForMaskedLM"

    def __init__(self, config: MosaicBertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.cls = BertOnlyMLMHead(config)
        self.post_init()
        self.tie_weights()  # transformers 5.0 does not on the meta device

    def get_output_embeddings(self) -> nn.Linear:
        return self.cls.predictions.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.cls.predictions.decoder = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        return_logits: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        layout: Layout | None = None,
        masked_index: Tensor | None = None,
    ) -> MaskedLMOutput | tuple:
        """Padded in; logits (B, S, V) out and, with ``labels``, the loss.

        Args:
            labels: (B, S), negative at tokens without loss. The loss is the mean cross entropy of the others.
            return_logits: with labels, also compute the logits of all tokens. By default only if not training: without
                them, the last layer and the head compute the masked tokens only.
            num_items_in_batch: divides the summed loss, instead of the number of masked tokens; transformers' Trainer
                counts it over the microbatches of a step.
            layout, masked_index: of an unpadded batch: runs ``forward_unpadded``. Training calls ``forward`` for it,
                because FSDP and hooks see nothing else.

        The other arguments, and the errors, are those of ``BertModel.forward``.
        """
        if layout is not None:
            assert input_ids is not None and masked_index is not None and labels is not None
            return self.forward_unpadded(input_ids, layout, masked_index, labels, token_type_ids)
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        mask = checked_mask(*inputs, labels)
        states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        weights = self.config.output_attentions if output_attentions is None else output_attentions
        full = states or weights or (not self.training if return_logits is None else return_logits)
        if labels is not None and input_ids is not None and not full and not in_exported_graph():
            layout = self.bert.layout(mask)
            labels_T = unpad_input(labels, layout.indices)
            masked_index = (labels_T >= 0).nonzero().squeeze(1)
            segments = None if token_type_ids is None else unpad_input(token_type_ids, layout.indices)
            ids_T, labels_M = unpad_input(input_ids, layout.indices), labels_T[masked_index]
            out: Any = self.forward_unpadded(ids_T, layout, masked_index, labels_M, segments)
            loss = mean_loss(out.loss_sum, out.count, num_items_in_batch)
            return self._returned(MaskedLMOutput(loss=loss), return_dict)

        encoded = self.bert(*inputs, weights, states, return_dict=True)
        logits, loss = self.cls(encoded.last_hidden_state), None  # (B, S, V)
        if labels is not None:
            labels = labels.where(mask, IGNORED)
            sums = masked_lm_loss(logits.flatten(0, 1), labels.flatten())
            loss = mean_loss(sums["loss_sum"], sums["count"], num_items_in_batch)
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return self._returned(output, return_dict)

    def forward_unpadded(
        self,
        input_ids: Tensor,
        layout: Layout,
        masked_index: Tensor,
        labels: Tensor,
        token_type_ids: Tensor | None = None,
    ) -> UnpaddedMaskedLMOutput:
        """The loss of an unpadded batch.

        Args:
            input_ids: (T,).
            layout: where each sequence starts.
            masked_index: (M,) int64, positions of the masked tokens in 0..T-1, ascending.
            labels: (M,), the original ids of the masked tokens.
            token_type_ids: (T,); None means segment 0.
        """
        states = self.bert.encode(input_ids, layout, token_type_ids, rows=masked_index)
        logits = self.cls(states[-1])  # (M, V)
        owned = owns_output(self.cls, {BertOnlyMLMHead, BertLMPredictionHead, nn.Linear})
        kernels = self.config.kernels
        loss = masked_lm_loss_in_place(logits, labels, kernels) if owned else masked_lm_loss(logits, labels)
        return UnpaddedMaskedLMOutput(**loss)


def _check_labels(labels: Tensor, shape: torch.Size, what: str) -> None:
    """Refuse labels whose number would be right by chance, or broadcast; raises ValueError."""
    if not in_graph() and labels.shape != shape:
        raise ValueError(f"labels: expected {what} = {tuple(shape)}, got {tuple(labels.shape)}")


class _Classifier(BertPreTrainedModel):
    """classifier(dropout(x)) and a loss, where x is the pooler's output (B, D) or the last state (B, S, D)."""

    output_class: type[SequenceClassifierOutput] | type[TokenClassifierOutput] | type[MultipleChoiceModelOutput]
    pooled: bool

    def __init__(self, config: MosaicBertConfig, classes: int | None = None):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=self.pooled)
        own = config.classifier_dropout
        self.dropout = nn.Dropout(config.hidden_dropout_prob if own is None else own)
        self.classifier = nn.Linear(config.hidden_size, classes or self.num_labels)  # pyright: ignore[reportArgumentType]
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput | TokenClassifierOutput | MultipleChoiceModelOutput | tuple:
        """Logits (B, num_labels) or (B, S, num_labels) and, with ``labels``, the mean loss.

        ``num_items_in_batch`` divides the summed loss, instead of the number of labels; transformers' Trainer counts it
        over the microbatches of a step. The other arguments, and the errors, are those of ``BertModel.forward``.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        encoded = self.bert(*inputs, output_attentions, output_hidden_states, return_dict=True)
        logits = self.classifier(self.dropout(encoded.pooler_output if self.pooled else encoded.last_hidden_state))
        loss = None if labels is None else self._loss(wide(logits), labels, num_items_in_batch)
        output = self.output_class(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self._returned(output, return_dict)

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        raise NotImplementedError


class BertForSequenceClassification(_Classifier):
    """MosaicBERT with a classification or regression head on the pooler, as BERT's.

    ``labels`` are (B,) or (B, num_labels); ``config.problem_type`` sets the loss. By default: regression for one label,
    single-label for integers, multi-label for floats.
    """

    _auto_class = "AutoModelForSequenceClassification"
    output_class, pooled = SequenceClassifierOutput, True

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        problem_type = self.config.problem_type
        if problem_type is None:
            single = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
            problem_type = "regression" if self.num_labels == 1 else single
        if problem_type == "single_label_classification":
            _check_labels(labels.flatten(), logits.shape[:1], "a class for each sequence, (B,)")
            return mean_cross_entropy(logits, labels.flatten(), num_items_in_batch)
        one = problem_type == "regression" and self.num_labels == 1
        what = "a number for each sequence, (B,)" if one else "one for each sequence and label, (B, num_labels)"
        _check_labels(labels.flatten() if one else labels, logits.shape[: 1 if one else 2], what)
        labels = labels.to(logits.dtype)
        if problem_type == "regression":
            loss_sum = F.mse_loss(logits.flatten(), labels.flatten(), reduction="sum")
        else:
            loss_sum = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return mean_loss(loss_sum, labels.numel(), num_items_in_batch)


class BertForTokenClassification(_Classifier):
    """MosaicBERT with a label for each token, without a pooler.

    ``labels`` are (B, S); the loss is the mean cross entropy of those that are not -100.
    """

    _auto_class = "AutoModelForTokenClassification"
    output_class, pooled = TokenClassifierOutput, False

    def _loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        _check_labels(labels, logits.shape[:2], "one for each token, (B, S)")
        return mean_cross_entropy(logits.flatten(0, 1), labels.flatten(), num_items_in_batch)


class BertForMultipleChoice(_Classifier):
    """MosaicBERT that scores each of C choices, a sequence each, by a head on the pooler (Devlin et al., section 4.4).

    ``input_ids`` and the other inputs are (B, C, S), ``labels`` (B,) the numbers of the right choices.
    """

    _auto_class = "AutoModelForMultipleChoice"
    output_class, pooled = MultipleChoiceModelOutput, True

    def __init__(self, config: MosaicBertConfig):
        super().__init__(config, classes=1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> SequenceClassifierOutput | TokenClassifierOutput | MultipleChoiceModelOutput | tuple:
        """Logits (B, C) and, with ``labels``, the mean loss; hidden states are (B * C, S, D).

        The other arguments, and the errors, are those of ``BertModel.forward``.
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or given.dim() != (3 if inputs_embeds is None else 4):
            raise ValueError(f"expected C choices, (B, C, S), got {None if given is None else tuple(given.shape)}")
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        shapes = {tuple(x.shape[:3]) for x in inputs if x is not None} if not in_graph() else ()
        if len(shapes) > 1:
            raise ValueError(f"expected inputs of one shape, (B, C, S), got {', '.join(map(str, sorted(shapes)))}")
        flat = [None if x is None else x.flatten(0, 1) for x in inputs]
        scored: Any = super().forward(*flat, None, output_attentions, output_hidden_states, True)  # pyright: ignore
        logits, loss = scored.logits.view(given.shape[:2]), None
        if labels is not None:
            _check_labels(labels.flatten(), logits.shape[:1], "a choice for each row, (B,)")
            loss = mean_cross_entropy(wide(logits), labels.flatten(), num_items_in_batch)
        output = MultipleChoiceModelOutput(
            loss=loss,  # pyright: ignore[reportArgumentType]
            logits=logits,
            hidden_states=scored.hidden_states,
            attentions=scored.attentions,
        )
        return self._returned(output, return_dict)


class BertForQuestionAnswering(BertPreTrainedModel):
    """MosaicBERT that scores each token as the first and as the last of the answer (Devlin et al., section 4.2)."""

    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: MosaicBertConfig):
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple:
        """Start and end logits, (B, S) each.

        Args:
            start_positions, end_positions: (B,), positions of the answer's first and last token. With both, also the
                loss: the mean of the two cross entropies, over the tokens without padding. A position at padding or
                outside of 0..S-1 has no loss.

        The other arguments, and the errors, are those of ``BertModel.forward``.
        """
        inputs = (input_ids, attention_mask, token_type_ids, position_ids, head_mask, inputs_embeds)
        encoded = self.bert(*inputs, output_attentions, output_hidden_states, return_dict=True)
        start_logits, end_logits = self.qa_outputs(encoded.last_hidden_state).unbind(-1)  # 2 x (B, S)
        loss = None
        if start_positions is not None and end_positions is not None:
            mask = torch.ones_like(start_logits) if attention_mask is None else attention_mask
            losses = []
            for logits, positions in ((start_logits, start_positions), (end_logits, end_positions)):
                _check_labels(positions.flatten(), logits.shape[:1], "a position for each sequence, (B,)")
                positions = positions.flatten().long()
                at = positions.clamp(0, logits.shape[1] - 1)
                is_token = (positions == at) & mask.bool().gather(1, at[:, None]).squeeze(1)
                scores = wide(logits).masked_fill(~mask.bool(), float("-inf"))
                losses.append(mean_cross_entropy(scores, positions.where(is_token, IGNORED)))
            loss = (losses[0] + losses[1]) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,  # pyright: ignore[reportArgumentType]
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self._returned(output, return_dict)
