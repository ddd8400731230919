"""Each kernel beside what a user would take instead: accuracy first, then time, bytes and FLOPs, on one card.

    python -m benchmarks.kernels.compare [--tokens 65536] [--rounds 20]
        [--cases attention layer_norm geglu head] [--out FOLDER]
    TRITON_INTERPRET=1 python -m benchmarks.kernels.compare --toy      # a CPU, sizes of a toy: only that all of it runs

Peers: plain torch, torch.compile of it, FlexAttention (compiled, mask of documents, ALiBi as score_mod), padded SDPA
with a materialised bias, and flash-attn where it is installed. Every output and gradient is compared with the same
computation in a higher precision first; an implementation that errs more than twice as much as plain torch in the same
dtype (or 4 roundings of the largest value) gets no time, and ours doing so ends the run with status 1. Times are of
forward and backward together, in rounds that interleave all implementations, each after the card's L2 cache was
overwritten: minima, and the median over rounds of peer / ours. Bytes and FLOPs are those that the task itself has
(inputs and outputs read or written once; recomputation not counted), beside the card's measured peaks.

Last line: ``kernels device=… checked=… failed=… left_out=… attention_S512_vs_flex=… …``; what is left out, a peer that
does not run here, is printed with its reason. Needs no Composer.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks import report
from benchmarks.variants import c4_like_lengths
from src import attention as A
from src import geglu_triton, layer_norm_triton, torch_ops
from src.bert_padding import unpack_heads, unpad_layout
from src.flash_attn_triton import tile_tables
from src.masked_lm_loss import masked_lm_head_loss, masked_lm_loss

Implementation = Callable[..., Tensor]


@dataclass
class Case:
    """One task: inputs that want gradients, and implementations of the same function of them."""

    name: str
    size: str
    inputs: tuple[Tensor, ...]
    reference: Implementation
    """Takes the inputs in fp32 (fp64 for fp32) and gives what is true."""
    plain: Implementation
    """Plain torch in the inputs' dtype; its error is the budget."""
    ours: Implementation
    peers: dict[str, Implementation] = field(default_factory=dict)
    bytes: int = 0
    """Moved at least, forward and backward."""
    flops: int = 0
    """Of forward and backward, recomputation not counted."""


# ----------------------------------------------------------------------------------------------------------------------
# Cases
# ----------------------------------------------------------------------------------------------------------------------


def attention_case(S: int, tokens: int, N: int, H: int, dtype: torch.dtype, device: str) -> Case:
    """C4-like lengths cut at S; the padded and the ragged see the same real tokens."""
    lengths_B = c4_like_lengths(max(1, tokens // S), S)
    T, B, longest = int(lengths_B.sum()), len(lengths_B), int(lengths_B.max())
    pairs = int(lengths_B.square().sum())
    lengths_B, slopes = lengths_B.to(device), A.alibi_slopes(N).to(device)
    layout = unpad_layout(lengths_B)
    layout = replace(layout, tables=tile_tables(layout))
    packed = torch.randn(T, 3, N, H).to(device, dtype).requires_grad_()
    position = torch.arange(longest, device=device)
    real = position < lengths_B[:, None]
    bias_NSS = (-slopes[:, None, None] * (position[:, None] - position).abs()).to(dtype)
    document = torch.arange(B, device=device).repeat_interleave(lengths_B)

    def through(impl: str) -> Implementation:
        def run(qkv: Tensor) -> Tensor:
            q, k, v = unpack_heads(qkv)
            return A.attention(q, k, v, layout, slopes, impl=impl)

        return run

    def padded(qkv: Tensor) -> Tensor:
        """What a user writes first: pad, SDPA with a bias that holds ALiBi and the padding, unpad."""
        x = qkv.new_zeros(*real.shape, *qkv.shape[1:])
        x[real] = qkv
        q, k, v = (t.transpose(1, 2) for t in x.unbind(2))
        bias = bias_NSS.masked_fill(~real[:, None, None, :], float("-inf"))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)[real]

    def score_mod(score, b, h, i, j):
        return score - slopes[h] * (i - j).abs()  # documents lie one after another: a distance is that of positions

    def same_document(b, h, i, j):
        return document[i] == document[j]

    block_mask = create_block_mask(same_document, None, None, T, T, device=device)
    flex = torch.compile(flex_attention) if device == "cuda" else flex_attention

    def flexible(qkv: Tensor) -> Tensor:
        q, k, v = (t.transpose(0, 1)[None] for t in qkv.unbind(1))
        out: Any = flex(q, k, v, score_mod=score_mod, block_mask=block_mask)
        return out[0].transpose(0, 1)

    peers = {"padded SDPA": padded, "FlexAttention": flexible, "torch": through("torch")}
    if A.MISSING["flash_attn"](device) is None and dtype != torch.float32:
        peers["flash-attn"] = through("flash_attn")
    return Case(
        "attention",
        f"S={S} T={T} fill={T / (B * longest):.2f}",
        (packed,),
        through("reference"),
        padded,
        through("triton"),
        peers,
        bytes=12 * T * N * H * dtype.itemsize,  # q, k, v, out; do, dq, dk, dv; and q, k, v, out again
        flops=14 * pairs * N * H,  # 2 products forward, 5 backward, 2 a multiply-add
    )


def layer_norm_case(T: int, D: int, dtype: torch.dtype, device: str) -> Case:
    """LayerNorm(residual + x), and with dropout the time alone (its masks are each implementation's own)."""
    x, residual = (torch.randn(T, D).to(device, dtype).requires_grad_() for _ in range(2))
    weight = (1 + 0.1 * torch.randn(D)).to(device).requires_grad_()
    bias = (0.1 * torch.randn(D)).to(device).requires_grad_()

    def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm((residual + x).to(weight.dtype), (D,), weight, bias, 1e-12).to(x.dtype)

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layer_norm_triton.layer_norm(x, weight, bias, 1e-12, residual)

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch_ops.layer_norm(x, weight, bias, 1e-12, residual)

    peers = {"torch": eager} | ({"torch.compile": torch.compile(plain)} if device == "cuda" else {})
    # Read x, residual; write y. Read dy and both again; write their one gradient.
    return Case("layer_norm", f"T={T} D={D}", (x, residual, weight, bias), plain, plain, ours, peers, 7 * x.nbytes)


def geglu_case(T: int, width: int, dtype: torch.dtype, device: str) -> Case:
    """gelu(gate) * up from the packed product."""
    packed = torch.randn(T, 2 * width).to(device, dtype).requires_grad_()

    def plain(packed: Tensor) -> Tensor:
        gate, up = packed.chunk(2, dim=-1)
        return F.gelu(gate) * up

    peers = {"torch": lambda packed: torch_ops.geglu(packed, 0.0)}
    if device == "cuda":
        peers["torch.compile"] = torch.compile(plain)
    return Case("geglu", f"T={T} I={width}", (packed,), plain, plain, geglu_triton.geglu, peers, 4 * packed.nbytes)


def head_case(M: int, D: int, V: int, dtype: torch.dtype, device: str) -> Case:
    """Projection of M masked tokens to V, and cross entropy."""
    x = torch.randn(M, D).to(device, dtype).requires_grad_()
    weight = (0.05 * torch.randn(V, D)).to(device, dtype).requires_grad_()
    bias = torch.zeros(V).to(device, dtype).requires_grad_()
    labels = torch.randint(V, (M,)).to(device)

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_lm_loss(F.linear(x, weight, bias), labels)["loss"]

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return masked_lm_head_loss(x, weight, bias, labels)["loss"]

    peers = {"torch": plain} | ({"torch.compile": torch.compile(plain)} if device == "cuda" else {})
    least = 2 * (x.nbytes + weight.nbytes) + 2 * M * V * dtype.itemsize
    return Case("head", f"M={M} V={V}", (x, weight, bias), plain, plain, ours, peers, least, 6 * M * V * D)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


def results_of(run: Implementation, inputs: tuple[Tensor, ...], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Output and all gradients, for a gradient that is the same each time; inputs in ``dtype`` if it is given."""
    if dtype is not None:
        inputs = tuple(x.detach().to(dtype).requires_grad_() for x in inputs)
    out = run(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad)]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    """Relative L2 error of each."""
    return [((x.to(y) - y).norm() / y.norm()).item() for x, y in zip(got, want, strict=True)]


def faults(got: list[float], plain: list[float], dtype: torch.dtype) -> list[str]:
    """Where an implementation errs more than twice as much as plain torch does, 4 roundings aside."""
    floor = 4 * torch.finfo(dtype).eps
    return [f"{a:.2g} > 2 x {b:.2g}" for a, b in zip(got, plain, strict=True) if not a <= max(2 * b, floor)]


def measure(case: Case, chosen: dict[str, Implementation], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of forward and backward, by implementation, one entry a round."""
    grad = torch.ones_like(next(iter(chosen.values()))(*case.inputs))
    cache = torch.empty(2**28 if device == "cuda" else 0, dtype=torch.int8, device=device)  # larger than any L2

    def once(run: Implementation) -> float:
        for _ in range(40):  # milliseconds, in which the host starts all that is timed: the card alone is
            cache.zero_()
        if device != "cuda":
            started = time.perf_counter()
            torch.autograd.grad(run(*case.inputs), case.inputs, grad)
            return 1e3 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(torch.cuda.current_stream())
        torch.autograd.grad(run(*case.inputs), case.inputs, grad)
        end.record(torch.cuda.current_stream())
        end.synchronize()
        return start.elapsed_time(end)

    for run in chosen.values():  # compile and warm
        once(run)
        once(run)
    times: dict[str, list[float]] = {name: [] for name in chosen}
    for _ in range(rounds):
        for name, run in chosen.items():
            times[name].append(once(run))
    return times


def peaks(dtype: torch.dtype) -> tuple[float, float]:
    """This card's FLOP/s in a large product and bytes/s in a large copy, measured."""

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(10):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream())
            run()
            end.record(torch.cuda.current_stream())
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)

    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    source, target = (torch.empty(2**30, dtype=torch.int8, device="cuda") for _ in range(2))
    return 2 * 8192**3 / best(lambda: a @ b), 2 * 2**30 / best(lambda: target.copy_(source))


def main(argv: list[str]) -> int:
    """Check, measure, print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536, help="padded tokens of a batch")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    known = ("attention", "layer_norm", "geglu", "head")
    parser.add_argument("--cases", nargs="+", choices=known, default=known)
    parser.add_argument("--toy", action="store_true", help="tiny, on the CPU, through Triton's interpreter")
    parser.add_argument("--out", type=Path, help="folder for kernels-CARD.json")
    args = parser.parse_args(argv)
    device = "cpu" if args.toy else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is found; on a CPU only --toy runs, with TRITON_INTERPRET=1")
    reason = A.MISSING["triton"](device)
    if reason is not None:
        parser.error(f"{reason}; set TRITON_INTERPRET=1 for --toy")
    torch.manual_seed(0)
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
    matmul, bandwidth = peaks(dtype) if device == "cuda" else (math.nan, math.nan)
    if device == "cuda":
        print(f"# measured peaks: {matmul / 1e12:.0f} TFLOP/s in a product, {bandwidth / 1e12:.2f} TB/s in a copy")

    rows, summary, checked, left_out, failed = [], [], 0, 0, []
    for name in args.cases:
        for case in makers[name]():
            want = results_of(case.reference, case.inputs, torch.float64 if dtype == torch.float32 else torch.float32)
            plain = errors(results_of(case.plain, case.inputs), want)
            chosen = {}
            for label, run in {"ours": case.ours, **case.peers}.items():
                try:
                    error = errors(results_of(run, case.inputs), want)
                except (torch.OutOfMemoryError, RuntimeError) as reason:  # a peer may not fit, or not know the shape
                    if label == "ours":
                        raise
                    print(f"{case.name} {case.size} {label}: does not run: {str(reason).splitlines()[0]}")
                    left_out += 1
                    continue
                checked += 1
                wrong = faults(error, plain, dtype)
                if wrong:
                    print(f"{case.name} {case.size} {label}: WRONG, no time is taken: {'; '.join(wrong)}")
                    failed += [f"{case.name} {case.size}"] if label == "ours" else []
                    continue
                chosen[label] = run
                rows.append({"case": case.name, "size": case.size, "implementation": label, "error": max(error)})
            del want
            times = measure(case, chosen, rounds, device) if chosen else {}
            for row in rows[-len(chosen) :] if chosen else []:
                label, ms = row["implementation"], times[row["implementation"]]
                row |= {"ms": min(ms), "ms_median": statistics.median(ms)}
                if device == "cuda":
                    row["flops_share"] = case.flops / (min(ms) * 1e-3) / matmul
                    row["bytes_share"] = case.bytes / (min(ms) * 1e-3) / bandwidth
                if "ours" in times:
                    ratio = statistics.median(b / a for a, b in zip(times["ours"], ms, strict=True))
                    row["times_ours"] = ratio
                    if label != "ours":
                        key = label.replace(" ", "_").replace("Attention", "").replace("padded_", "").lower()
                        summary.append(f"{case.name}_{case.size.split()[0].replace('=', '')}_vs_{key}={ratio:.2f}")
                print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()), flush=True)
            if args.out is not None:  # after each case, so that a run that is stopped leaves what it has
                path = args.out / f"kernels-{about['device'].replace(' ', '_') if device == 'cuda' else 'cpu'}.json"
                peak = {} if device == "cpu" else {"matmul": matmul, "bandwidth": bandwidth}
                report.write_json(path, {**about, "dtype": str(dtype), **peak, "rows": rows})
    print(f"kernels device={device} checked={checked} failed={len(failed)} left_out={left_out} {' '.join(summary)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
