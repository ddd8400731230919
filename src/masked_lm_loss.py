"""The masked-language-model loss: cross entropy of the masked tokens, from their logits; and means of other losses.

The logits (M, V) are the largest tensor of a step: at base size 61 KB per masked token in bf16. In training they are
stored once, in the product's dtype, and the backward overwrites them with their gradient. On a GPU a kernel does both
(cross_entropy_triton.py). In plain torch, fp32 copies and the softmax exist for one block of rows at a time.

Letters: M masked tokens, V vocabulary.
"""

import logging
from functools import cache
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cross_entropy_triton import fused_backward, fused_forward
from .graphs import in_graph
from .triton_common import rows_of, use_triton

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position without loss: no gradient, not counted. Any negative label means the same."""

BLOCK_ELEMENTS = 2**24
"""Logits per block, 64 MB in fp32: enough to fill a large GPU, little compared with what training stores."""


def masked_lm_loss(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Cross entropy of ``logits`` with ``labels``, in plain torch.

    Args:
        logits: (M, V), M may be 0.
        labels: (M,) integers, negative for rows without loss.

    Returns:
        loss: () fp32, ``loss_sum / max(count, 1)``.
        loss_sum: () fp32, summed over the rows with a label.
        correct: () int64, rows with a label whose highest logit is the label.
        count: () int64, rows with a label.

        For fp64 logits, fp64 instead of fp32.

    Raises:
        RuntimeError: a label is V or more (on a GPU, a device-side assertion).
    """
    logits = wide(logits)
    labels = labels.long().where(labels >= 0, IGNORED)
    loss_sum = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return _fields(loss_sum, (logits.detach().argmax(dim=-1) == labels).sum(), (labels >= 0).sum())


def masked_lm_loss_in_place(logits: Tensor, labels: Tensor, kernels: str = "auto") -> dict[str, Any]:
    """The same, for logits that nothing else reads (``owns_output``): the backward overwrites them.

    Args:
        kernels: auto, triton or torch, as in ``MosaicBertConfig``. The kernel reads each logit once; with it a label of
            V or more makes the loss NaN, and its row of the gradient, instead of raising.

    Raises:
        TypeError: logits that the kernel does not support, such as fp64.
        ValueError: the labels are not (M,).
    """
    if labels.shape != logits.shape[:1]:
        raise ValueError(f"labels: expected one for each row, ({len(logits)},), got {tuple(labels.shape)}")
    fused = use_triton(kernels, logits)
    rows = rows_of(logits) if fused else logits
    loss_sum, counts = _InPlaceLoss.apply(rows, labels.long().contiguous(), fused)  # pyright: ignore[reportGeneralTypeIssues]
    return _fields(loss_sum, *counts.unbind())


def owns_output(head: nn.Module, ours: set[type]) -> bool:
    """Whether nothing keeps what the head returns: no hook, and no module put in the place of one of ``ours``.

    False in a graph, too: the compiler fuses the passes over the logits itself.
    """
    if in_graph():
        return False
    makers = [module for name, module in head.named_modules() if "transform" not in name]
    owned = not any(type(module) not in ours or module._forward_hooks for module in makers)
    if not owned:
        _log_once("the head has a hook or an adapter: the loss keeps its logits, and needs more memory")
    return owned


@cache
def _log_once(message: str) -> None:
    log.info(message)


def mean_loss(loss_sum: Tensor, count: Tensor | int, num_items_in_batch: Tensor | int | None) -> Tensor:
    """The mean over ``count`` items; or a microbatch's part of the mean over all items of a batch. 0 without any."""
    items = count if num_items_in_batch is None else num_items_in_batch
    return loss_sum / (items.clamp(min=1) if isinstance(items, Tensor) else max(items, 1))


def wide(logits: Tensor) -> Tensor:
    """In fp32, or fp64."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def mean_cross_entropy(logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Mean cross entropy of (n, classes) over the labels (n,) that are not IGNORED; 0 if all are."""
    labels = labels if labels.is_floating_point() else labels.long()  # torch refuses int32
    loss_sum = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)
    return mean_loss(loss_sum, (labels != IGNORED).sum(), num_items_in_batch)


def _fields(loss_sum: Tensor, correct: Tensor, count: Tensor) -> dict[str, Any]:
    return {"loss": loss_sum / count.clamp(min=1), "loss_sum": loss_sum, "correct": correct, "count": count}


class _InPlaceLoss(torch.autograd.Function):
    """The summed loss (), and how many rows are correct and how many have a label, (2,) int64.

    Saves the logits, and each row's maximum and sum of exp.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
        losses, counts, top, total = (fused_forward if fused else _forward)(logits, labels)
        ctx.save_for_backward(logits, labels, top, total)
        ctx.set_materialize_grads(False)
        ctx.fused, ctx.spent = fused, False
        counts = counts.sum(0)
        ctx.mark_non_differentiable(counts)
        return losses.sum(), counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if dloss is None:
            return None, None, None
        if ctx.spent:
            raise RuntimeError(
                "the masked-language-model loss supports one backward, which overwrites its logits; "
                "the model's return_logits=True keeps them"
            )
        ctx.spent = True
        logits, *others = ctx.saved_tensors
        (fused_backward if ctx.fused else _backward)(dloss, logits, *others)
        return logits, None, None


def _forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each row: loss (M,), 0 without a label; whether its label has the highest logit, and whether it has a label,
    (M, 2); maximum (M,); sum of exp(logit - maximum) (M,).

    Maximum and sum are separate because logit - maximum is exact; for large logits, logit - log-sum-exp is not.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    top, total, picked = (logits.new_empty(len(logits), dtype=exact) for _ in range(3))
    best = labels.new_empty(len(logits))
    for rows in _blocks(logits):
        block = logits[rows].to(exact)
        torch.max(block, dim=1, out=(top[rows], best[rows]))
        picked[rows] = block.gather(1, labels[rows, None].clamp(min=0)).squeeze(1)
        total[rows] = (block - top[rows, None]).exp_().sum(1)
    losses = (total.log() - (picked - top)).where(labels >= 0, 0.0)
    return losses, torch.stack([best == labels, labels >= 0], dim=1), top, total


def _backward(dloss: Tensor, logits: Tensor, labels: Tensor, top: Tensor, total: Tensor) -> None:
    """Overwrites the logits by their gradient: dloss * (exp(logit - maximum) / sum - [column is the label])."""
    scale = dloss.to(top.dtype) * (labels >= 0)  # (M,)
    for rows in _blocks(logits):
        block = logits[rows].to(top.dtype)  # the logits themselves, if they have that dtype
        block.sub_(top[rows, None]).exp_().div_(total[rows, None])
        block.scatter_add_(1, labels[rows, None].clamp(min=0), block.new_full((1, 1), -1.0).expand(len(block), 1))
        torch.mul(block, scale[rows, None], out=logits[rows])


def _blocks(logits: Tensor) -> list[slice]:
    M, V = logits.shape
    size = max(1, BLOCK_ELEMENTS // V)
    return [slice(start, min(start + size, M)) for start in range(0, M, size)]
