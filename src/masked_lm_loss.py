"""The masked-language-model loss: projection of the masked tokens to the vocabulary and cross entropy, fused.

The logits (M, V) are the largest tensor of a step: at base size 61 KB per masked token in bf16. They are stored once,
in the product's dtype, and the backward overwrites them with their gradient. fp32 copies and the softmax exist for one
block of rows at a time. In evaluation (no gradients) so do the logits, and nothing is saved.

Letters: M masked tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Label of a position without loss: no gradient, not counted. Any negative label means the same."""

BLOCK_ELEMENTS = 2**24
"""Logits per block, 64 MB in fp32: enough to fill a large GPU, little compared with what training stores."""


def masked_lm_head_loss(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> dict[str, Any]:
    """Cross entropy of ``x @ weight.T + bias`` with ``labels``; saves nothing larger than the logits.

    Args:
        x: (M, D), M may be 0.
        weight: (V, D), the decoder's.
        bias: (V,).
        labels: (M,) int64, negative for rows without loss.

    Returns:
        loss: () fp32, ``loss_sum / max(count, 1)``.
        loss_sum: () fp32, summed over the rows with a label.
        correct: () int64, rows with a label whose highest logit is the label.
        count: () int64, rows with a label.

        For an fp64 model, fp64 instead of fp32. The product has the autocast dtype, everything else is fp32. dW
        accumulates in fp32; before torch 2.8, and on a CPU, it is rounded once to the autocast dtype, as in nn.Linear.

    Raises:
        RuntimeError: a label is V or more (on a GPU, a device-side assertion).
    """
    if torch.compiler.is_compiling():  # the compiler fuses the passes over the logits itself
        return masked_lm_loss(F.linear(x, weight, bias), labels)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    loss_sum, correct = _HeadLoss.apply(x, weight, bias, labels, dtype, torch.is_grad_enabled())  # pyright: ignore
    return _fields(loss_sum, correct, labels)


def masked_lm_loss(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """The same loss from logits (M, V), in plain torch."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.where(labels >= 0, IGNORED)
    loss_sum = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return _fields(loss_sum, (logits.detach().argmax(dim=-1) == labels).sum(), labels)


def _fields(loss_sum: Tensor, correct: Tensor, labels: Tensor) -> dict[str, Any]:
    count = (labels >= 0).sum()
    return {"loss": loss_sum / count.clamp(min=1), "loss_sum": loss_sum, "correct": correct, "count": count}


class _HeadLoss(torch.autograd.Function):
    """Saves x and the weight in the product's dtype, the logits, and each row's maximum and sum of exp.

    Maximum and sum are separate because logit - maximum is exact; for large logits, logit - log-sum-exp is not.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, dtype: torch.dtype, grad_enabled: bool
    ) -> tuple[Tensor, Tensor]:
        keep = grad_enabled and any(ctx.needs_input_grad)
        exact = torch.promote_types(dtype, torch.float32)
        ctx.dtypes = x.dtype, weight.dtype, bias.dtype
        x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        logits = torch.addmm(bias, x, weight.t()) if keep else None
        # Of each row, (M,): maximum, sum of exp(logit - maximum), the label's logit, index of the maximum.
        top, total, picked = (x.new_empty(len(x), dtype=exact) for _ in range(3))
        best = labels.new_empty(len(x))
        for rows in _blocks(len(x), len(weight)):
            block = (torch.addmm(bias, x[rows], weight.t()) if logits is None else logits[rows]).to(exact)
            torch.max(block, dim=1, out=(top[rows], best[rows]))
            picked[rows] = block.gather(1, labels[rows, None].clamp(min=0)).squeeze(1)
            total[rows] = (block - top[rows, None]).exp_().sum(1)
        ctx.save_for_backward(x, weight, labels, logits, top, total)
        ctx.set_materialize_grads(False)
        ctx.spent = False
        correct = (best == labels).sum()
        ctx.mark_non_differentiable(correct)
        return (total.log() - (picked - top)).where(labels >= 0, 0.0).sum(), correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if dloss is None:
            return (None,) * 6
        if ctx.spent:
            raise RuntimeError("the masked-language-model loss supports one backward, which overwrites its logits")
        ctx.spent = True
        x, weight, labels, logits, top, total = ctx.saved_tensors
        scale = dloss.to(top.dtype) * (labels >= 0)  # (M,)
        for rows in _blocks(len(x), len(weight)):
            block = logits[rows].to(top.dtype)  # the logits themselves, if they have that dtype
            block.sub_(top[rows, None]).exp_().div_(total[rows, None])
            block.scatter_add_(1, labels[rows, None].clamp(min=0), block.new_full((1, 1), -1.0).expand(len(block), 1))
            torch.mul(block, scale[rows, None], out=logits[rows])
        with torch.autocast(x.device.type, enabled=False):
            dx = torch.mm(logits, weight)
            dweight = _weight_grad(logits, x)
            dbias = logits.sum(0, dtype=top.dtype)
        grads = (grad.to(dtype) for grad, dtype in zip((dx, dweight, dbias), ctx.dtypes, strict=True))
        return (*grads, None, None, None)


def _blocks(rows: int, V: int) -> list[slice]:
    size = max(1, BLOCK_ELEMENTS // V)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _weight_grad(dlogits: Tensor, x: Tensor) -> Tensor:
    """(V, D); in fp32 on a GPU with torch 2.8 or later, whose ``torch.mm`` has ``out_dtype``."""
    if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16) and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.mm(dlogits.t(), x, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    return torch.mm(dlogits.t(), x)
