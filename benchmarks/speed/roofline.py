"""The least time of a training step on a GPU: FLOPs and bytes of each part, divided by the card's measured peaks.

Calculated, nothing is timed. A part takes the longer of its products at ``EFFICIENCY`` of the card's FLOP/s and its
bytes at ``STREAM`` of the card's bytes/s. Left out: the host, gaps between kernels, Composer, copies of the batch.
Bytes count each tensor that a part reads or writes once, in bf16, with weights and their gradients in fp32.
``python -m benchmarks.publish`` writes the tables in docs/scaling.md; the measured times are of gpu-h200.json.

Letters: T tokens, M masked tokens, D hidden size, N heads, I width of the gated unit, L layers, V vocabulary.
"""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.variants import Shape, c4_like_lengths
from src.bert_layers import BertForMaskedLM
from src.configuration_bert import MosaicBertConfig
from src.train.muon import newton_schulz_flops
from src.train.optim import muon

EFFICIENCY = {"products": 0.95, "attention": 0.45}
"""Share of the FLOP/s of a large bf16 product. Read from the profiles of an H200 and rounded, one for all lengths."""
STREAM = 0.8
"""Share of the bytes/s of a large copy."""
CARDS = {"H200": (773e12, 4.17e12), "H100": (800e12, 3.0e12)}
"""FLOP/s and bytes/s, measured on such cards."""
MASKED = 0.3
SETTINGS = {(128, 128, "c4"): "", (128, 512, "c4"): "400,000; goal 530,000"}
SETTINGS |= {(512, 128, "c4"): "500,000", (2048, 32, "1.0"): "420,000"}
"""Length, sequences, fill of the profiled steps; the tokens per second that this project wants of an H100."""


GPUS = (1, 8, 64)
"""That share the step's batch."""
SOAP_SIDE = 3072
"""Longest side of a matrix that SOAP preconditions."""


@dataclass(frozen=True)
class Kernels:
    """What differs between versions of the code."""

    logit_bytes: int = 8
    """Moved per logit by loss, gradient and bias gradient; fused: 2 read; 2 read, 2 written; 2 read."""
    one_tile: int = 128
    """Longest sequence of a batch whose dq, dk and dv come from one program, with 5 products instead of 7."""
    repeats: int = 1
    """Warps that compute the same score in dk/dv (kernels_aot.md)."""


PROFILED = Kernels(logit_bytes=68, one_tile=0, repeats=2)
"""The code of the H200's profiles."""


class Part(NamedTuple):
    group: str
    name: str
    flops: int
    bytes: int

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        compute = self.flops / (flops_per_s * EFFICIENCY[self.group]) if self.flops else 0.0
        return max(compute, self.bytes / (bytes_per_s * STREAM))


def parameters(shape: Shape) -> tuple[int, int]:
    """Weights of the matrices, and all parameters."""
    D, I, L, V = shape.hidden, shape.width, shape.layers, shape.vocabulary  # noqa: E741
    matrices = L * (4 * D * D + 3 * D * I) + D * D + V * D
    return matrices, matrices + L * 9 * D + 7 * D + V  # biases 5, LayerNorms 4 per layer; segments 2, head, embeddings


def parts(shape: Shape, lengths: Tensor, M: int, kernels: Kernels, microbatches: int = 1) -> list[Part]:
    """Forward, backward and optimizer of a step on sequences of ``lengths`` (B,), M tokens of them masked."""
    D, I, L, V = shape.hidden, shape.width, shape.layers, shape.vocabulary  # noqa: E741
    T, pairs = int(lengths.sum()), int(lengths.square().sum())
    rows = (L - 1) * T + M  # of all layers, behind attention
    found = []
    shapes = {"Wqkv": (D, 3 * D, L * T, L), "out": (D, D, rows, L), "GLU": (D, 2 * I, rows, L), "wo": (I, D, rows, L)}
    shapes |= {"transform": (D, D, M, 1), "decoder": (D, V, M, 1)}
    for name, (inputs, outputs, n, weights) in shapes.items():  # forward, gradients of input and weight
        moved = 6 * ((inputs + outputs) * n + microbatches * weights * inputs * outputs)
        found.append(Part("products", name, 6 * inputs * outputs * n, moved))
    # Products of attention, each 2 * D * pairs FLOPs per layer, and tensors (T, D) that are read or written.
    attention = {"forward": (2, 4)}
    if int(lengths.max()) <= kernels.one_tile:
        attention |= {"backward": (5, 8)}
    else:
        attention |= {"dk/dv": (4 * kernels.repeats, 6), "dq": (3, 5), "delta": (0, 2)}
    for name, (products, tensors) in attention.items():
        found.append(Part("attention", name, L * products * 2 * D * pairs, L * 2 * tensors * T * D))
    found += [
        # Tensors: 3 of each layer's two; embeddings: fp32 to bf16; head. Backward: 5 with dropout, 4 without.
        Part("LayerNorm", "forward", 0, 2 * D * 6 * rows + 6 * T * D + 4 * M * D),
        Part("LayerNorm", "backward", 0, 2 * D * 9 * rows + 10 * T * D + 6 * M * D),
        Part("GeGLU", "forward", 0, 2 * 3 * I * rows),
        Part("GeGLU", "backward", 0, 2 * 5 * I * rows),
        Part("other", "loss", 0, kernels.logit_bytes * M * V),
        # Words and segments in fp32: 16, backward 8; dropout with its mask: 10. Zeros, and the sum with the head's.
        Part("other", "embeddings", 0, 34 * T * D + microbatches * 16 * V * D),
        Part("other", "bias gradients", 0, 2 * (3 * D * L * T + 2 * D * rows + M * D)),
        # Residual gradients: 2 per layer; selection of the masked rows: 2, and their gradients.
        Part("other", "sums", 0, 12 * D * rows + 4 * D * (T + 4 * M)),
    ]
    matrices, every = parameters(shape)
    # Once fp32 to bf16; in each microbatch gradients back, added from the second one on.
    found.append(Part("other", "weights", 0, matrices * (6 + 6 * microbatches + 12 * (microbatches - 1))))
    return [*found, Part("optimizer", "AdamW", 0, 28 * every)]  # reads weight, gradient, moments; writes all but one


def milliseconds(setting: tuple[int, int, str], kernels: Kernels, card: str) -> dict[str, float]:
    """By group, of a step of the base model with one microbatch; also ``all``, and ``tokens`` of the step."""
    S, B, fill = setting
    lengths = c4_like_lengths(B, S) if fill == "c4" else torch.full((B,), S)
    tokens = int(lengths.sum())
    found: dict[str, float] = defaultdict(float)
    for part in parts(Shape(), lengths, round(MASKED * tokens), kernels):
        found[part.group] += 1e3 * part.seconds(*CARDS[card])
    return {**found, "all": sum(found.values()), "tokens": tokens}


NAMES = {"products": "nvjet", "attention": "flash_attn", "LayerNorm": "layer_norm", "GeGLU": "geglu"}
NAMES |= {"optimizer": "multi_tensor_apply"}  # names of the profile's kernels; all others are ``other``


def optimizers() -> str:
    """FLOPs of an optimizer's products in a step of the base model on 4,096 sequences like C4's at 128.

    Muon shares the matrices of one shape among the GPUs. SOAP (Vyas et al., 2024, algorithm 3), of a library, does not:
    for each side of a matrix, of at most SOAP_SIDE, 3 products with the gradient or the update (into the eigenbasis,
    out of it, and the preconditioner's); every 10 steps a product of the side's own matrices and a QR decomposition,
    8/3 n^3. Its state also holds two matrices per side, which are not counted.
    """
    shape = Shape()
    lengths = c4_like_lengths(4096, 128)
    step = sum(part.flops for part in parts(shape, lengths, round(MASKED * int(lengths.sum())), Kernels()))
    with torch.device("meta"):
        model = BertForMaskedLM(MosaicBertConfig())
    soap = 0.0
    for r, c in (p.shape for p in model.parameters() if p.ndim == 2):
        for side in (side for side in (r, c) if side <= SOAP_SIDE):
            soap += 3 * 2 * r * c * side + (2 + 8 / 3) * side**3 / 10
    optimizer = muon(model, 1e-3)
    elements = sum(p.numel() for group in optimizer.param_groups if group["parts"] for p in group["params"])
    rows: list[dict[str, Any]] = [
        {"name": "AdamW", "flops": 0, "state": 8, "gathered": 0, **dict.fromkeys((f"on_{n}" for n in GPUS), 0)},
        {"name": "Muon", "flops": newton_schulz_flops(optimizer), "state": 4, "gathered": 2 * elements},
        {"name": "SOAP", "flops": soap, "state": 8, "gathered": 0, **{f"on_{n}": n * soap / step for n in GPUS}},
    ]
    rows[1] |= {f"on_{n}": n * newton_schulz_flops(optimizer, n) / step for n in GPUS}
    titles = ["optimizer", "TFLOP per step", *(f"added on {n} GPU{'s' * (n > 1)}" for n in GPUS)]
    titles += ["gathered, MB", "state, bytes per weight"]
    cells = [f"{{on_{n}:.1%}}" for n in GPUS]
    row = " | ".join(["{name}", "{flops:T.1f}", *cells, "{gathered:M.0f}", "{state}"])
    return report.table(" | ".join(titles), row, rows)


def compared(profile: dict[str, Any]) -> str:
    """Calculated and measured milliseconds of the profiled steps, by group."""
    rows = []
    for S, B, fill in SETTINGS:
        name = f"S={S} B={B} fill={fill}"
        step, predicted = profile[name], milliseconds((S, B, fill), PROFILED, "H200")
        measured = {g: sum(k["ms"] for k in step["kernels"] if text in k["name"]) for g, text in NAMES.items()}
        total = step["busy_share"] * step["ms"]
        measured |= {"other": total - sum(measured.values()), "all": total}
        rows.append({"name": name, **{f"{group}_": ms for group, ms in measured.items()}, **predicted})
    groups = ("products", "attention", "LayerNorm", "GeGLU", "other", "optimizer", "all")
    cells = (f"{{{group}:.1f}} / {{{group}_:.1f}}" for group in groups)
    return report.table(" | ".join(("step", *groups)), " | ".join(("{name}", *cells)), rows)


def expected() -> str:
    """Calculated speed of the present code."""
    rows = []
    for (S, B, fill), goal in SETTINGS.items():
        row: dict[str, Any] = {"name": f"S={S} B={B} fill={fill}", "goal": goal}
        for card in CARDS:
            before, now = (milliseconds((S, B, fill), kernels, card) for kernels in (PROFILED, Kernels()))
            row |= {f"{card}_before": before["all"], f"{card}_now": now["all"]}
            row[f"{card}_speed"] = 1e3 * now["tokens"] / now["all"]
        rows.append(row)
    titles = ["step", *(f"{card}, ms: before | now | tokens per second" for card in CARDS), "wanted of an H100"]
    cells = (f"{{{card}_before:.1f}} | {{{card}_now:.1f}} | {{{card}_speed:,.0f}}" for card in CARDS)
    return report.table(" | ".join(titles), " | ".join(("{name}", *cells, "{goal}")), rows)
