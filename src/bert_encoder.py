"""MosaicBERT's layers: embeddings, attention, gated linear units, on the T tokens of a batch without padding.

Architecture: Portes et al., 2023, MosaicBERT, arXiv 2312.17482, section 2. Post-LayerNorm as in BERT (Devlin et al.,
2019, arXiv 1810.04805); GLU from Shazeer, 2020, arXiv 2002.05202.

Letters: B sequences, S padded length, T tokens of the batch, M masked tokens, D hidden size, N heads, H head size, I
GLU width. In an exported graph (B, S, ...) stands in place of (T, ...).
"""

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from .attention import AlibiSlopes, attention, attention_weights, resolve
from .bert_padding import Layout, PaddedLayout, index_first_axis, unpack_heads
from .configuration_bert import MosaicBertConfig
from .geglu_triton import geglu as geglu_triton
from .layer_norm_triton import layer_norm as layer_norm_triton
from .torch_ops import dropout
from .torch_ops import geglu as geglu_torch
from .torch_ops import layer_norm as layer_norm_torch
from .triton_common import draw_key, use_triton
from .triton_common import resolve as resolve_kernels


class LayerNorm(nn.LayerNorm):
    """LayerNorm(residual + dropout(x)), with sum and statistics at least in fp32; returns the autocast dtype."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.kernels = resolve_kernels(config.kernels)

    def forward(
        self, input: Tensor, residual: Tensor | None = None, dropout_p: float = 0.0, key: Tensor | None = None
    ) -> Tensor:
        """(..., D) -> (..., D). ``key`` (1,) int64 is for the kernels' dropout, as in ``BertEncoder.keys``; if None, a
        new one."""
        p = dropout_p if self.training else 0.0
        if not use_triton(self.kernels, input):
            return layer_norm_torch(input, self.weight, self.bias, self.eps, residual, p)
        key = draw_key(input) if p and key is None else key
        return layer_norm_triton(input, self.weight, self.bias, self.eps, residual, p, key)


class BertEmbeddings(nn.Module):
    """Word and segment embeddings, LayerNorm, dropout. Positions come from ALiBi."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, input_ids: Tensor | None, token_type_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        x = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (T, D)
        segments = self.token_type_embeddings  # segment 0 by default
        if token_type_ids is None:
            token_type_ids = torch.zeros(1, dtype=torch.int64, device=x.device)
        x = x + segments(token_type_ids)
        return dropout(self.LayerNorm(x), self.dropout_p, self.training)


class BertSelfAttention(nn.Module):
    """Queries, keys and values by one matrix product, then attention within each sequence."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout_p = config.attention_probs_dropout_prob
        self.impl = config.attention
        resolve(self.impl, self.dropout_p)  # a wrong choice raises here, not at the first step
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def qkv(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, (T, N, H) each, of (T, D)."""
        return unpack_heads(self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1)))  # (T, 3, N, H) -> 3 x (T, N, H)

    def forward(self, x: Tensor, layout: Layout | PaddedLayout, slopes: Tensor, rows: Tensor | None) -> Tensor:
        """(T, D) -> (T, D). With ``rows`` (M,), (M, D): of these tokens only."""
        dropout_p = self.dropout_p if self.training else 0.0
        q, k, v = self.qkv(x)
        out = attention(q, k, v, layout, slopes, dropout_p, self.impl).flatten(-2)  # (T, N, H) -> (T, D)
        return out if rows is None else index_first_axis(out, rows)  # (M, D)

    def weights(self, x: Tensor, mask: Tensor, slopes: Tensor) -> Tensor:
        """Attention weights (B, N, S, S) before dropout, zero at padding, of a layer's input (B, S, D)."""
        q, k, _ = self.Wqkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        with torch.autocast(x.device.type, enabled=False):  # scores are at least fp32, as in ``attention``
            return attention_weights(q, k, mask, slopes) * mask[:, None, :, None]


class BertSelfOutput(nn.Module):
    """LayerNorm(residual + dropout(dense(x))), the projection after attention."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config)
        self.dropout_p = config.hidden_dropout_prob

    def forward(self, x: Tensor, residual: Tensor, key: Tensor | None = None) -> Tensor:
        return self.LayerNorm(self.dense(x), residual, self.dropout_p, key)


class BertAttention(nn.Module):
    """Self-attention with its output projection, residual and LayerNorm: (T, D) -> (T, D) or (M, D)."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.self = BertSelfAttention(config)
        self.output = BertSelfOutput(config)

    def forward(
        self,
        x: Tensor,
        layout: Layout | PaddedLayout,
        slopes: Tensor,
        rows: Tensor | None = None,
        key: Tensor | None = None,
    ) -> Tensor:
        residual = x if rows is None else index_first_axis(x, rows)
        return self.output(self.self(x, layout, slopes, rows), residual, key)


class BertGatedLinearUnitMLP(nn.Module):
    """LayerNorm(x + wo(dropout(gelu(x Wg) * (x Wu)))): Shazeer's GEGLU. Wg and Wu are one matrix without bias."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.gated_layers = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.wo = nn.Linear(config.intermediate_size, config.hidden_size)
        self.layernorm = LayerNorm(config)
        self.dropout_p, self.kernels = config.hidden_dropout_prob, resolve_kernels(config.kernels)

    def forward(self, x: Tensor, key: Tensor | None = None) -> Tensor:
        gate_and_up = self.gated_layers(x)  # (T, 2I)
        p = self.dropout_p if self.training else 0.0
        if use_triton(self.kernels, gate_and_up):
            key = draw_key(x) if p and key is None else key
            hidden = geglu_triton(gate_and_up, p, key)  # (T, I)
        else:
            hidden = geglu_torch(gate_and_up, p)
        return self.layernorm(self.wo(hidden), residual=x)  # (T, D)


class BertLayer(nn.Module):
    """One Transformer layer. With ``rows`` it computes attention of all T tokens, the rest for these rows.

    ``keys`` are those of the kernels' dropout after attention and in the gated unit, as in ``BertEncoder.keys``.
    """

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.attention = BertAttention(config)
        self.mlp = BertGatedLinearUnitMLP(config)

    def forward(
        self,
        x: Tensor,
        layout: Layout | PaddedLayout,
        slopes: Tensor,
        rows: Tensor | None = None,
        keys: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Tensor:
        return self.mlp(self.attention(x, layout, slopes, rows, keys[0]), keys[1])


class BertEncoder(nn.Module):
    """The layers, on (T, D)."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.layer = nn.ModuleList([BertLayer(config) for _ in range(config.num_hidden_layers)])
        self.alibi = AlibiSlopes(config.num_attention_heads)
        self.dropout_p, self.kernels = config.hidden_dropout_prob, resolve_kernels(config.kernels)
        self.gradient_checkpointing = False  # transformers sets both attributes
        self._gradient_checkpointing_func: Callable[..., Tensor]

    def keys(self, x: Tensor) -> tuple[Tensor | None, ...]:
        """The keys of the kernels' dropout, (1,) int64 each, two per layer, by one draw; None if they are not used."""
        n = 2 * len(self.layer)
        if self.training and self.dropout_p and use_triton(self.kernels, x):
            return draw_key(x, n).split(1)
        return (None,) * n

    def forward(self, x: Tensor, layout: Layout | PaddedLayout, rows: Tensor | None = None) -> tuple[Tensor, ...]:
        """The input and each layer's output, (T, D); with ``rows`` (M,) the last is (M, D)."""
        states, slopes, keys = (x,), self.alibi(x.device), self.keys(x)
        for i, layer in enumerate(self.layer):
            args = (x, layout, slopes, rows if i == len(self.layer) - 1 else None, keys[2 * i : 2 * i + 2])
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, *args)
            else:
                x = layer(*args)
            states += (x,)
        return states


class BertPooler(nn.Module):
    """tanh(dense(first token)), as in BERT."""

    def __init__(self, config: MosaicBertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first_token: Tensor) -> Tensor:  # (B, D)
        return torch.tanh(self.dense(first_token))
