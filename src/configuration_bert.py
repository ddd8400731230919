"""The shape of a MosaicBERT, as a Hugging Face config."""

from typing import Any

from transformers import PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_bert.MosaicBertConfig",
    "AutoModel": "bert_layers.BertModel",
    "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
    "AutoModelForSequenceClassification": "bert_layers.BertForSequenceClassification",
    "AutoModelForTokenClassification": "bert_layers.BertForTokenClassification",
}
"""Auto class to class, for trust_remote_code, in the source files beside a saved model's weights."""


class MosaicBertConfig(PretrainedConfig):
    """Shape and regularisation of a MosaicBERT (Portes et al., 2023, arXiv 2312.17482). Defaults: MosaicBERT-Base.

    There is no maximal length: positions come from ALiBi (Press et al., 2021, arXiv 2108.12409).

    Args:
        vocab_size: rows of the word embeddings (V). 30,522 BERT word pieces, padded to a multiple of 64 for speed.
        hidden_size: width of the residual stream (D).
        num_hidden_layers: number of Transformer layers (L).
        num_attention_heads: attention heads (N); divides ``hidden_size``.
        intermediate_size: width of the gated linear unit (I).
        hidden_dropout_prob: dropout after the embeddings' LayerNorm, after attention's output and in the GLU.
        attention_probs_dropout_prob: dropout of attention weights; needs ``attention`` ``reference`` or ``torch``.
        type_vocab_size: number of segment ids.
        initializer_range: standard deviation of the initial weights.
        layer_norm_eps: epsilon of every LayerNorm.
        attention: implementation of attention (``attention.IMPLEMENTATIONS``), or ``auto``.
        kernels: LayerNorm and GLU: ``triton``, ``torch``, or ``auto``: triton on a GPU and torch elsewhere.
        classifier_dropout: dropout before the classification head; None means ``hidden_dropout_prob``.
        pad_token_id: id of [PAD], recorded for users; the model computes no padding.
        tie_word_embeddings: whether the head's decoder shares the word embeddings' weight, as in BERT.
        kwargs: of every Hugging Face config, such as ``num_labels``.

    Raises:
        ValueError: ``hidden_size`` is not a multiple of ``num_attention_heads``.
    """

    model_type = "mosaic_bert"
    _auto_class = "AutoConfig"  # so that save_pretrained writes this source file too

    def __init__(
        self,
        vocab_size: int = 30528,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.0,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        attention: str = "auto",
        kernels: str = "auto",
        classifier_dropout: float | None = None,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ):
        super().__init__(**{"pad_token_id": pad_token_id, "auto_map": dict(AUTO_MAP), **kwargs})
        self.tie_word_embeddings = tie_word_embeddings  # transformers 5 has no default of its own
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}; "
                "the heads share the hidden size evenly"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.type_vocab_size = type_vocab_size
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.attention = attention
        self.kernels = kernels
        self.classifier_dropout = classifier_dropout


BertConfig = MosaicBertConfig
"""Name of the class in the auto_map of published MosaicBERTs and of older exports."""
