"""The shape of a MosaicBERT, as a Hugging Face config."""

from typing import Any

from transformers import PretrainedConfig

AUTO_MAP = {
    "AutoConfig": "configuration_bert.MosaicBertConfig",
    "AutoModel": "bert_layers.BertModel",
    "AutoModelForPreTraining": "bert_layers.BertForMaskedLM",
    "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
    "AutoModelForSequenceClassification": "bert_layers.BertForSequenceClassification",
    "AutoModelForTokenClassification": "bert_layers.BertForTokenClassification",
    "AutoModelForQuestionAnswering": "bert_layers.BertForQuestionAnswering",
    "AutoModelForMultipleChoice": "bert_layers.BertForMultipleChoice",
}
"""Class of each auto class, for trust_remote_code; a saved model's folder holds these source files."""


class MosaicBertConfig(PretrainedConfig):
    """Shape and regularisation of a MosaicBERT (Portes et al., 2023, arXiv 2312.17482). Defaults: MosaicBERT-Base.

    There is no maximal length: positions come from ALiBi (Press et al., 2021, arXiv 2108.12409).

    Raises:
        ValueError: ``hidden_size`` is not a multiple of ``num_attention_heads``.
    """

    model_type = "mosaic_bert"
    _auto_class = "AutoConfig"  # makes save_pretrained write this source file too

    def __init__(
        self,
        vocab_size: int = 30528,  # V; 30,522 BERT word pieces, padded to a multiple of 64 for speed
        hidden_size: int = 768,  # D, width of the residual stream
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,  # N; divides hidden_size
        intermediate_size: int = 3072,  # I, width of the gated linear unit
        hidden_dropout_prob: float = 0.1,  # after the embeddings' LayerNorm, after attention's output, and in the GLU
        attention_probs_dropout_prob: float = 0.0,  # not 0: needs attention="torch" or "reference"
        type_vocab_size: int = 2,  # number of segment ids
        initializer_range: float = 0.02,  # standard deviation of the initial weights
        layer_norm_eps: float = 1e-12,
        attention: str = "auto",  # or a key of attention.IMPLEMENTATIONS; auto: triton on a GPU, torch elsewhere
        kernels: str = "auto",  # of LayerNorm and GLU: "triton", "torch", or "auto" as above
        classifier_dropout: float | None = None,  # before a classification head; None: hidden_dropout_prob
        pad_token_id: int = 0,  # of [PAD]; the model itself does not read it
        tie_word_embeddings: bool = True,  # the MLM head's decoder shares the word embeddings' weight, as in BERT
        **kwargs: Any,  # of every Hugging Face config, such as num_labels
    ):
        super().__init__(**{"pad_token_id": pad_token_id, "auto_map": dict(AUTO_MAP), **kwargs})
        self.tie_word_embeddings = tie_word_embeddings  # transformers 5 has no default
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
"""The name in the auto_map of published MosaicBERTs and of older exports."""
