"""Hugging Face's BERT as a ComposerModel: the baseline, padded, with learned position embeddings."""

from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLayer

from src.bert_layers import UnpaddedMaskedLMOutput
from src.data.microbatches import Batch, counts_of
from src.data.packing import Microbatch, SplitBatch
from src.masked_lm_loss import masked_lm_loss
from src.mosaic_bert import MaskedLMModel


class HFBert(MaskedLMModel):
    """transformers' BertForMaskedLM, unchanged, for pretraining."""

    def __init__(self, config: BertConfig, gradient_checkpointing: bool = False):
        super().__init__(BertForMaskedLM(config), BertLayer, gradient_checkpointing)

    def forward(self, batch: Microbatch) -> UnpaddedMaskedLMOutput:
        """A microbatch of ``split_padded``. The model computes logits of every position."""
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits  # (B, S, V)
        masked = batch["labels"] >= 0
        return UnpaddedMaskedLMOutput(**masked_lm_loss(logits[masked], batch["labels"][masked]))

    def flops_per_batch(self, batch: Batch | SplitBatch | Microbatch) -> int:
        """Floating-point operations of a training step on a batch, with padding, as this model computes it.

        Counts matrix products, 2 per multiply-add, the backward as twice the forward; the head on every position.
        """
        counts = counts_of(batch)
        c = self.config
        D, L = c.hidden_size, c.num_hidden_layers
        layers = L * (4 * D * D + 2 * D * c.intermediate_size)
        attention = L * 2 * D * counts.max_seqlen
        head = D * D + D * c.vocab_size
        return 6 * counts.positions * (layers + attention + head)
