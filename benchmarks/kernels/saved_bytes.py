"""Bytes that a layer keeps between forward and backward, ours and plain PyTorch's, counted on any machine.

    python -m benchmarks.kernels.saved_bytes [--lengths 32 128]

One sequence of T tokens in bf16, base widths, dropout 0.1; without a GPU the kernels run through Triton's interpreter.
Storages that autograd saves count once; parameters and the layer's input do not count. Last line:
``saved_bytes layer_per_token=… plain_per_token=…`` at the longest length.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when it is first imported

from benchmarks import report
from src.attention import alibi_slopes, attention
from src.bert_layers import BertLayer
from src.bert_padding import unpad_layout
from src.configuration_bert import MosaicBertConfig
from src.flash_attn_triton import tile_tables
from src.geglu_triton import geglu
from src.layer_norm_triton import layer_norm
from src.triton_common import draw_key

D, N, I, P = 768, 12, 3072, 0.1  # noqa: E741


def kept_bytes(function: Callable[..., Any], *args: Any, ignored: tuple[Tensor, ...] = ()) -> tuple[Any, int]:
    """Result, and bytes that its backward keeps; storages count once, those of ``args`` and ``ignored`` do not."""
    seen = {x.untyped_storage().data_ptr() for x in (*args, *ignored) if isinstance(x, Tensor)}
    total = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal total
        pointer = x.untyped_storage().data_ptr()
        total += 0 if pointer in seen else x.untyped_storage().nbytes()
        seen.add(pointer)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = function(*args)
    return out, total


def plain_attention(qkv: Tensor, slopes: Tensor) -> Tensor:
    """(T, 3, N, H) -> (T, N, H) of one sequence, by the formula."""
    q, k, v = qkv.transpose(0, 1).transpose(1, 2).unbind(0)  # (N, T, H)
    position = torch.arange(len(qkv), device=qkv.device)
    bias = -slopes[:, None, None] * (position[:, None] - position).abs()
    probs = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + bias).softmax(dim=-1).to(v.dtype)
    return (probs @ v).transpose(0, 1)


def plain_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """LayerNorm(residual + dropout(x)), with the sum in fp32."""
    return F.layer_norm(residual.float() + F.dropout(x, P), (len(weight),), weight, bias).to(x.dtype)


def plain_geglu(gate_and_up: Tensor) -> Tensor:
    """dropout(gelu(gate) * up)."""
    gate, up = gate_and_up.chunk(2, dim=-1)
    return F.dropout(F.gelu(gate) * up, P)


def plain_layer(x: Tensor, layer: BertLayer, slopes: Tensor) -> Tensor:
    """A layer of MosaicBERT made of the parts above, under autocast."""
    block, output, mlp = layer.attention.self, layer.attention.output, layer.mlp
    mixed = plain_attention(block.Wqkv(x).unflatten(-1, (3, N, -1)), slopes).flatten(1)
    x = plain_layer_norm(output.dense(mixed), output.LayerNorm.weight, output.LayerNorm.bias, x)
    hidden, norm = plain_geglu(mlp.gated_layers(x)), mlp.layernorm
    return F.layer_norm(x.float() + mlp.wo(hidden), (D,), norm.weight, norm.bias).to(x.dtype)


def count(T: int, device: str) -> dict[str, tuple[int, int]]:
    """Bytes kept by ours and by plain PyTorch, for each part."""

    def rows(*shape: int) -> Tensor:
        return torch.randn(T, *shape, device=device, dtype=torch.bfloat16, requires_grad=True)

    layout = unpad_layout(torch.tensor([T], device=device))
    layout, slopes = replace(layout, tables=tile_tables(layout)), alibi_slopes(N).to(device)
    fixed = (layout.cu_seqlens, slopes, *layout.tables.values())

    def ours(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        return attention(q, k, v, layout, slopes, impl="triton")

    x, residual, qkv, packed = rows(D), rows(D), rows(3, N, D // N), rows(2 * I)
    weight, bias, key = torch.ones(D, device=device), torch.zeros(D, device=device), draw_key(x)
    layer = BertLayer(MosaicBertConfig(hidden_dropout_prob=P, attention="triton", kernels="triton")).to(device).train()
    parameters = tuple(layer.parameters())

    def both(ours: Callable[..., Any], plain: Callable[..., Any], *args: Tensor) -> tuple[int, int]:
        ignored = (*parameters, *fixed)
        return kept_bytes(ours, *args, ignored=ignored)[1], kept_bytes(plain, *args, ignored=ignored)[1]

    counted = {
        "attention": both(ours, lambda qkv: plain_attention(qkv, slopes), qkv),
        "LayerNorm(residual + dropout(x))": both(
            lambda x, w, b, residual: layer_norm(x, w, b, 1e-12, residual, P, key),
            plain_layer_norm,
            *(x, weight, bias, residual),
        ),
        "dropout(gelu(gate) * up)": both(lambda packed: geglu(packed, P, key), plain_geglu, packed),
    }
    with torch.autocast(device, torch.bfloat16):
        a, b = both(lambda x: layer(x, layout, slopes), lambda x: plain_layer(x, layer, slopes), x)
    # Autocast keeps a cast copy of each weight. It does not grow with T, so it is subtracted.
    weights = sum(2 * p.numel() for p in parameters if p.ndim == 2)
    return counted | {"a whole layer": (a - weights, b - weights)}


def main(argv: list[str]) -> None:
    parser = report.parser(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128])
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| kept for the backward, bytes per token | T | ours | plain PyTorch |\n|---|---|---|---|")
    last = (0.0, 0.0)
    for T in args.lengths:
        for name, sizes in count(T, device).items():
            ours, plain = last = sizes[0] / T, sizes[1] / T
            print(f"| {name} | {T} | {ours:,.0f} | {plain:,.0f} |")
    print(f"saved_bytes layer_per_token={last[0]:.0f} plain_per_token={last[1]:.0f}")


if __name__ == "__main__":
    main(sys.argv[1:])
