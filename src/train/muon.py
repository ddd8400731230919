"""Muon: momentum made orthogonal for the matrices of the layers, AdamW for everything else, in one optimizer.

K. Jordan et al. (2024), kellerjordan.github.io/posts/muon; J. Liu et al. (2025), "Muon is scalable for LLM training",
arXiv 2502.16982, whose scale (section 2.2) lets both parts use one learning rate.
"""

import math
from collections import Counter, defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial of degree 5 that a Newton-Schulz iteration applies to the singular values (Jordan et al.)."""
ITERATIONS = 5
UPDATE_RMS = 0.2
"""Root mean square of an update's elements over the learning rate, near AdamW's (Liu et al., section 2.2)."""


def orthogonalize(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """U S V' of each matrix U Σ V' in x (n, rows, columns).

    S is between 0.68 and 1.21 where Σ is at least 0.002 of the matrix's Frobenius norm, and smaller below: about 485
    times that share where it is tiny. Zero stays zero.

    Args:
        dtype: of the products and of the result. None: bf16 on a GPU, x's on a CPU, where bf16 is slower.
    """
    a, b, c = COEFFICIENTS
    wide = x.mT if x.shape[-2] > x.shape[-1] else x
    y = wide.to(dtype or (torch.bfloat16 if x.is_cuda else x.dtype))
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = torch.bmm(y, y.mT)
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.mT if x.shape[-2] > x.shape[-1] else y


def orthogonalize_shared(x: Tensor) -> Tensor:
    """``orthogonalize``, by an equal share of the n matrices on each process; x is the same on all of them."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if world == 1:
        return orthogonalize(x)
    n, share = len(x), -(-len(x) // world)
    at = dist.get_rank() * share
    mine = orthogonalize(x[at : at + share])
    # The last processes may have fewer, or none. Zeros stand in, because all must gather the same size.
    padded = mine.new_zeros(share, *x.shape[1:])
    padded[: len(mine)] = mine
    gathered = mine.new_empty(world * share, *x.shape[1:])
    dist.all_gather_into_tensor(gathered, padded)
    return gathered[:n]


class Muon(torch.optim.Optimizer):
    """Muon for groups with ``parts``, torch's fused AdamW for the others.

    Matrices of one shape are orthogonalized in one batch of products; each process does an equal share of them, and
    gathers those of the others. So all processes must have the same weights and gradients, as with DDP.

    Args:
        groups: parameter groups. ``parts``: matrices that a parameter holds, one above another, such as 3 in Wqkv; each
            is orthogonalized alone.
        lr, weight_decay: of all groups that have none. A step shrinks weights by weight_decay * lr.
        momentum: of matrices; Nesterov's.
        betas, eps: of AdamW.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
    ):
        # fused: tells load_state_dict that AdamW's step counts live on the device.
        options = {"lr": lr, "momentum": momentum, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(groups, {**options, "parts": 0, "fused": True})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            (self._step_matrices if group["parts"] else self._step_others)(group, trained)
        return loss

    def _step_matrices(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        lr, momentum, parts = group["lr"], group["momentum"], group["parts"]
        alike = defaultdict(list)
        for p in trained:
            alike[p.shape].append(p)
        for (rows, columns), matrices in alike.items():
            averaged = torch.stack([self._averaged(p, momentum) for p in matrices])
            update = orthogonalize_shared(averaged.view(-1, rows // parts, columns))
            update = update.reshape(averaged.shape).to(averaged)
            scale = UPDATE_RMS * math.sqrt(max(rows // parts, columns))
            torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
            torch._foreach_add_(matrices, list(update.unbind()), alpha=-lr * scale)  # pyright: ignore[reportPrivateImportUsage]

    def _averaged(self, p: Tensor, momentum: float) -> Tensor:
        """A matrix's gradient with Nesterov's momentum, up to a factor, which ``orthogonalize`` removes."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        state["momentum"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum"], momentum)

    def _step_others(self, group: dict[str, Any], trained: list[Tensor]) -> None:
        for p in trained:
            if not self.state[p]:
                self.state[p]["step"] = torch.zeros((), device=p.device)
                self.state[p] |= {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
        states = [self.state[p] for p in trained]
        beta1, beta2 = group["betas"]
        adamw(
            trained,
            [p.grad for p in trained],  # pyright: ignore[reportArgumentType]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def newton_schulz_flops(optimizer: torch.optim.Optimizer, processes: int = 1) -> int:
    """FLOPs of a step's matrix products, in the process that has most; 0 of other optimizers.

    An iteration on an (m, n) matrix, m <= n, has products of 2 m m n, 2 m m m and 2 m m n FLOPs.
    """
    flops = 0
    for group in optimizer.param_groups:
        parts = group.get("parts", 0)
        alike = Counter(p.shape for p in group["params"] if parts)
        for (rows, columns), count in alike.items():
            m, n = sorted((rows // parts, columns))
            flops += -(-parts * count // processes) * ITERATIONS * (4 * m * m * n + 2 * m**3)
    return flops
