"""Each kernel compared with what a user would take instead: accuracy first, then time, on one card.

    python -m benchmarks.kernels.compare [--tokens 65536] [--rounds 20]
        [--cases attention layer_norm geglu head] [--out FOLDER]
    TRITON_INTERPRET=1 python -m benchmarks.kernels.compare --toy      # a CPU, toy sizes: only that all of it runs
    TRITON_INTERPRET=1 python -m benchmarks.kernels.compare --saved    # any machine: bytes saved for the backward

Baselines: plain torch; torch.compile of it; FlexAttention (compiled, ALiBi as score_mod, documents as a block mask);
padded SDPA with a bias in memory; our split backward, where one tile holds whole sequences; flash-attn and flash-attn-4
where they are installed. Every output and gradient is compared with the same computation in a higher precision. An
implementation whose error is more than twice that of plain torch in the same dtype (and more than 4 roundings of the
largest value) is not timed; if it is ours, the exit status is 1. Times are of forward and backward, in interleaved
rounds, each after the L2 cache was overwritten: minimum, median, median ratio to ours.

Last line: ``kernels device=… checked=… failed=… left_out=… attention_S512_vs_flex=… …``. A baseline that does not run
here is left out, and its reason is printed. Needs neither Composer nor streaming.

--saved: what autograd saves per token of one sequence, ours and plain PyTorch's. Storages count once; parameters and a
part's inputs do not count.
"""

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks import report, timing
from benchmarks.variants import c4_like_lengths
from src import attention as A
from src import geglu_triton, layer_norm_triton, torch_ops
from src.attention_tiles import architecture, tile_tables, tiles_for
from src.bert_encoder import BertLayer
from src.bert_padding import Layout, unpack_heads, unpad_layout
from src.configuration_bert import MosaicBertConfig
from src.masked_lm_loss import masked_lm_loss, masked_lm_loss_in_place
from src.triton_common import draw_key

Implementation = Callable[..., Tensor]


@dataclass
class Case:
    """One task: inputs that require gradients, and implementations of the same function of them."""

    name: str
    size: str
    inputs: tuple[Tensor, ...]
    plain: Implementation
    """Plain torch in the inputs' dtype; twice its error is allowed."""
    ours: Implementation
    baselines: dict[str, Implementation]
    reference: Implementation | None = None
    """Its results on inputs in fp32 (fp64 for fp32) count as exact; None: those of ``plain``."""


def document_mask(lengths_B: Tensor, size: int = 128) -> BlockMask:
    """FlexAttention's mask of packed documents. Each query block overlaps a range of key blocks, so the table of blocks
    comes from the lengths; ``create_block_mask`` would first make a (T, T) mask, 3.4 GB at T = 58,625.
    """
    document_T = torch.arange(len(lengths_B), device=lengths_B.device).repeat_interleave(lengths_B)
    T = len(document_T)
    first, last = document_T[::size], torch.cat([document_T[size - 1 :: size], document_T[-1:]])[: math.ceil(T / size)]
    overlap = (first[:, None] <= last) & (first <= last[:, None])
    one = (first == last) & (size * torch.arange(1, len(first) + 1, device=first.device) <= T)  # a whole block of one
    full = one[:, None] & one & (first[:, None] == first)

    def table(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Number of key blocks of each query block, and all key blocks, the chosen ones first."""
        order = chosen.int().argsort(dim=1, descending=True, stable=True)
        return chosen.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]

    def same_document(b, h, i, j):
        return document_T[i] == document_T[j]

    tables = *table(overlap & ~full), *table(full)
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=size, mask_mod=same_document, seq_lengths=(T, T))


def attention_case(S: int, tokens: int, N: int, H: int, dtype: torch.dtype, device: str) -> Case:
    """C4-like lengths cut at S; padded and ragged implementations see the same tokens."""
    lengths_B = c4_like_lengths(max(1, tokens // S), S)
    T, B, longest = int(lengths_B.sum()), len(lengths_B), int(lengths_B.max())
    lengths_B, slopes = lengths_B.to(device), A.alibi_slopes(N).to(device)
    layout = unpad_layout(lengths_B)
    layout = replace(layout, tables=tile_tables(layout))
    packed = torch.randn(T, 3, N, H).to(device, dtype).requires_grad_()
    position = torch.arange(longest, device=device)
    real = position < lengths_B[:, None]
    bias_NSS = (-slopes[:, None, None] * (position[:, None] - position).abs()).to(dtype)

    def through(impl: str, layout: Layout = layout) -> Implementation:
        def run(qkv: Tensor) -> Tensor:
            q, k, v = unpack_heads(qkv)
            return A.attention(q, k, v, layout, slopes, impl=impl)

        return run

    def padded(qkv: Tensor) -> Tensor:
        """What a user writes first: pad, SDPA with ALiBi and padding in one bias, unpad."""
        x = qkv.new_zeros(*real.shape, *qkv.shape[1:])
        x[real] = qkv
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        bias = bias_NSS.masked_fill(~real[:, None, None, :], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)[real]

    def score_mod(score, b, h, i, j):
        return score - slopes[h] * (i - j).abs()  # within a document, packed positions have the same distance

    block_mask = document_mask(lengths_B)
    flex = torch.compile(flex_attention) if device == "cuda" else flex_attention

    def flexible(qkv: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in qkv.unbind(1))
        out: Any = flex(q, k, v, score_mod=score_mod, block_mask=block_mask)
        return out[0].transpose(0, 1)

    baselines = {"padded SDPA": padded, "FlexAttention": flexible}
    whole = tiles_for(H, dtype, architecture(packed.device)).whole
    if whole is not None and longest <= whole.rows:
        baselines["split backward"] = through("triton", replace(layout, max_seqlen=whole.rows + 1))
    for impl in ("flash_attn", "flash_attn_4"):
        if A.MISSING[impl](device) is None and dtype != torch.float32:
            baselines[impl.replace("_", "-")] = through(impl)
    size = f"S={S} T={T} fill={T / (B * longest):.2f}"
    return Case("attention", size, (packed,), padded, through("triton"), baselines, through("reference"))


def compiled(plain: Implementation, eager: Implementation, device: str) -> dict[str, Implementation]:
    """The baselines of a case: ``eager`` and, on a GPU, torch.compile of ``plain``."""
    return {"torch": eager} | ({"torch.compile": torch.compile(plain)} if device == "cuda" else {})


def layer_norm_case(T: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """LayerNorm(residual + x)."""
    x, residual = (torch.randn(T, D).to(device, dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.1 * torch.randn(D)).to(device).requires_grad_()
    bias = (0.1 * torch.randn(D)).to(device).requires_grad_()

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm((residual + x).to(weight.dtype), (D,), weight, bias, 1e-12).to(x.dtype)

    def by(layer_norm: Implementation) -> Implementation:
        return lambda x, residual, weight, bias: layer_norm(x, weight, bias, 1e-12, residual)

    inputs, ours = (x, residual, weight, bias), by(layer_norm_triton.layer_norm)
    return Case("layer_norm", f"T={T} D={D}", inputs, plain, ours, compiled(plain, by(torch_ops.layer_norm), device))


def geglu_case(T: int, width: int, dtype: torch.dtype, device: str) -> Case:
    """gelu(gate) * up of packed (T, 2 * width)."""
    packed = torch.randn(T, 2 * width).to(device, dtype).requires_grad_()

    def plain(packed: Tensor) -> Tensor:
        gate, up = packed.chunk(2, dim=-1)
        return F.gelu(gate) * up

    baselines = compiled(plain, torch_ops.geglu, device)
    return Case("geglu", f"T={T} I={width}", (packed,), plain, geglu_triton.geglu, baselines)


def head_case(M: int, D: int, V: int, dtype: torch.dtype, device: str) -> Case:
    """Projection of M masked tokens to V, and cross entropy."""
    x = torch.randn(M, D).to(device, dtype).requires_grad_()
    weight = (0.05 * torch.randn(V, D)).to(device, dtype).requires_grad_()
    bias = torch.zeros(V).to(device, dtype).requires_grad_()
    labels = torch.randint(V, (M,)).to(device)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_lm_loss(F.linear(x, weight, bias), labels)["loss"]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_lm_loss_in_place(F.linear(x, weight, bias), labels, "triton")["loss"]

    return Case("head", f"M={M} V={V}", (x, weight, bias), plain, ours, compiled(plain, plain, device))


def results_of(run: Implementation, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and all gradients, for a fixed output gradient; inputs in ``dtype`` if given."""
    if dtype is not None:
        inputs = tuple(x.detach().to(dtype).requires_grad_() for x in inputs)
    out = run(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Relative L2 error of each tensor."""
    return [((x.to(y) - y).norm() / y.norm()).item() for x, y in zip(got, want, strict=True)]


def measure(case: Case, chosen: dict[str, Implementation], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of forward and backward in each round, by implementation."""
    grad = torch.ones_like(case.ours(*case.inputs))

    def run(implementation: Implementation) -> None:
        torch.autograd.grad(implementation(*case.inputs), case.inputs, grad)

    runs = {name: partial(run, implementation) for name, implementation in chosen.items()}
    return timing.interleaved(runs, rounds, timing.device_clock(device, flushes=40), warmup=2)


def check(case: Case, dtype: torch.dtype) -> tuple[dict[str, tuple[Implementation, float]], dict[str, str]]:
    """The implementations that are right, with their largest relative error; and those that are not, with the reason.

    Raises:
        RuntimeError: ours does not run.
    """
    want = results_of(
        case.reference or case.plain, case.inputs, torch.float64 if dtype == torch.float32 else torch.float32
    )
    plain = errors(results_of(case.plain, case.inputs), want)
    right, refused = {}, {}
    for label, run in {"ours": case.ours, **case.baselines}.items():
        try:
            error = errors(results_of(run, case.inputs), want)
        except (torch.OutOfMemoryError, RuntimeError) as reason:  # a baseline may not fit or not support the shape
            if label == "ours":
                raise
            refused[label] = f"does not run: {str(reason).splitlines()[0]}"
            continue
        pairs = [(a, b) for a, b in zip(error, plain, strict=True) if not a <= max(2 * b, 4 * torch.finfo(dtype).eps)]
        if pairs:
            refused[label] = f"WRONG, not timed: {'; '.join(f'{a:.2g} > 2 x {b:.2g}' for a, b in pairs)}"
        else:
            right[label] = run, max(error)
    return right, refused


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


def saved(T: int, device: str) -> dict[str, list[int]]:
    """Bytes saved by ours and by plain PyTorch for one sequence of T tokens in bf16; base widths, dropout 0.1."""
    config = MosaicBertConfig(hidden_dropout_prob=0.1, attention="triton", kernels="triton")
    D, N, p, layer = config.hidden_size, config.num_attention_heads, 0.1, BertLayer(config).to(device).train()
    layout = unpad_layout(torch.tensor([T], device=device))
    layout, slopes = replace(layout, tables=tile_tables(layout)), A.alibi_slopes(N).to(device)
    parameters, position = tuple(layer.parameters()), torch.arange(T, device=device)
    ignored = (*parameters, layout.cu_seqlens, slopes, *layout.tables.values())
    block, output, mlp = layer.attention.self, layer.attention.output, layer.mlp

    def plain_attention(qkv: Tensor) -> Tensor:
        q, k, v = qkv.transpose(0, 1).transpose(1, 2).unbind(0)  # (N, T, H)
        bias = -slopes[:, None, None] * (position[:, None] - position).abs()
        probs = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5 + bias).softmax(dim=-1).to(v.dtype)
        return (probs @ v).transpose(0, 1)

    def plain_norm(x: Tensor, residual: Tensor, norm: Any = mlp.layernorm, p: float = p) -> Tensor:
        return F.layer_norm(residual.float() + F.dropout(x, p), (D,), norm.weight, norm.bias).to(x.dtype)

    def plain_geglu(packed: Tensor) -> Tensor:
        gate, up = packed.chunk(2, dim=-1)
        return F.dropout(F.gelu(gate) * up, p)

    def plain_layer(x: Tensor) -> Tensor:
        mixed = plain_attention(block.Wqkv(x).unflatten(-1, (3, N, -1))).flatten(1)
        x = plain_norm(output.dense(mixed), x, output.LayerNorm)
        return plain_norm(mlp.wo(plain_geglu(mlp.gated_layers(x))), x, p=0.0)

    def ours_attention(qkv: Tensor) -> Tensor:
        q, k, v = qkv.unbind(1)
        return A.attention(q, k, v, layout, slopes, impl="triton")

    def ours_norm(x: Tensor, residual: Tensor) -> Tensor:
        return layer_norm_triton.layer_norm(x, mlp.layernorm.weight, mlp.layernorm.bias, 1e-12, residual, p, key)

    x, residual, qkv, packed = (
        torch.randn(T, *shape, device=device, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((D,), (D,), (3, N, D // N), (8 * D,))
    )
    key = draw_key(x)
    parts: dict[str, tuple[Implementation, Implementation, tuple[Tensor, ...]]] = {
        "attention": (ours_attention, plain_attention, (qkv,)),
        "LayerNorm(residual + dropout(x))": (ours_norm, plain_norm, (x, residual)),
        "dropout(gelu(gate) * up)": (lambda x: geglu_triton.geglu(x, p, key), plain_geglu, (packed,)),
        "a whole layer": (lambda x: layer(x, layout, slopes, None, (key, key)), plain_layer, (x,)),
    }
    found = {}
    with torch.autocast(device, torch.bfloat16):
        for name, (ours, plain, inputs) in parts.items():
            # Autocast keeps a cast copy of each of the layer's weights. It does not grow with T, so it is subtracted.
            casts = sum(2 * w.numel() for w in parameters if w.ndim == 2) if name == "a whole layer" else 0
            found[name] = [kept_bytes(function, *inputs, ignored=ignored)[1] - casts for function in (ours, plain)]
    return found


def main(argv: list[str]) -> int:
    """Check, measure, print; returns the exit status."""
    parser = report.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=65536, help="padded tokens of a batch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    known = ("attention", "layer_norm", "geglu", "head")
    parser.add_argument("--cases", nargs="+", choices=known, default=known)
    parser.add_argument("--toy", action="store_true", help="tiny, on the CPU, through Triton's interpreter")
    parser.add_argument("--out", type=Path, help="folder for kernels-CARD.json")
    parser.add_argument("--saved", action="store_true", help="only print what is saved for the backward")
    args = parser.parse_args(argv)
    device = report.device_of(parser, args.toy or (args.saved and not torch.cuda.is_available()))
    reason = A.MISSING["triton"](device)
    if reason is not None:
        parser.error(f"{reason}; set TRITON_INTERPRET=1 for --toy and --saved")
    torch.manual_seed(0)
    if args.saved:
        found = [(T, *item) for T in (64, 256) for item in saved(T, device).items()]
        rows = [{"name": name, "T": T, "ours": ours / T, "plain": plain / T} for T, name, (ours, plain) in found]
        row = "{name} | {T} | {ours:,.0f} | {plain:,.0f}"
        print(report.table("saved, bytes per token | T | ours | plain PyTorch", row, rows))
        return 0
    torch.backends.cuda.matmul.allow_tf32 = False
    dtype = torch.float32 if args.toy else getattr(torch, args.dtype)
    tokens, rounds, lengths = (200, 1, [64]) if args.toy else (args.tokens, args.rounds, args.lengths)
    D, N, V = (48, 2, 211) if args.toy else (768, 12, 30528)
    makers = {
        "attention": lambda: [attention_case(S, tokens, N, D // N, dtype, device) for S in lengths],
        "layer_norm": lambda: [layer_norm_case(tokens, D, dtype, device)],
        "geglu": lambda: [geglu_case(tokens, 4 * D, dtype, device)],
        "head": lambda: [head_case(math.ceil(0.3 * tokens), D, V, dtype, device)],
    }
    about = report.machine(device)
    print(f"# {report.described(about)}, {dtype}{', interpreted' if args.toy else ''}")

    rows, summary, checked, left_out, failed = [], [], 0, 0, 0
    for case in (case for name in args.cases for case in makers[name]()):
        right, refused = check(case, dtype)
        for label, reason in refused.items():
            print(f"{case.name} {case.size} {label}: {reason}")
        missing = sum(reason.startswith("does not run") for reason in refused.values())
        checked, left_out = checked + len(right) + len(refused) - missing, left_out + missing
        failed += "ours" in refused
        times = measure(case, {label: run for label, (run, _) in right.items()}, rounds, device)
        for label, (_, error) in right.items():
            row = {"case": case.name, "size": case.size, "implementation": label, "error": error}
            row |= {"ms": 1e3 * min(times[label]), "ms_median": 1e3 * statistics.median(times[label])}
            if "ours" in times:
                row["times_ours"] = timing.ratios(times["ours"], times[label])[0]
                if label != "ours":
                    key = label.replace(" ", "_").replace("Attention", "").replace("padded_", "").lower()
                    where = f"{case.name}_{case.size.split()[0].replace('=', '')}"
                    summary.append(f"{where}_vs_{key}={row['times_ours']:.2f}")
            rows.append(row)
            print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
        if args.out is not None:  # after each case, so that a run that is stopped leaves what it has
            path = args.out / f"kernels-{about['device'].replace(' ', '_') if device == 'cuda' else 'cpu'}.json"
            report.write_json(path, {**about, "dtype": str(dtype), "rows": rows})
    print(f"kernels device={device} checked={checked} failed={failed} left_out={left_out} {' '.join(summary)}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
