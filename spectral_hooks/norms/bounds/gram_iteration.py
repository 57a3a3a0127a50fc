"""Frobenius norms of powers of the Gram matrix on a frequency grid."""

from __future__ import annotations

from math import inf, prod, sqrt

import torch
from torch import Tensor

from ...linalg.krylov import with_gradient
from ...linalg.memory import at_once
from ...linalg.precision import float32_is_kept
from ...linalg.symbols import half_plane, symbol
from ...operators.arguments import on_kernel
from ...operators.base import KernelOperator
from .certified import SQRT2, certified, check_oversampling, check_steps, sampling, squared_lengths
from .frobenius_grid import largest_frobenius

#: Below it float32 may know nothing of a symbol's norm, whose fourth power is taken.
_UNDERFLOW = 1e-8


@on_kernel
def gram_iteration(op: KernelOperator, *, steps: int = 6, oversampling: float = 8) -> Tensor:
    """Squares of the symbol's Gram matrices, and a Frobenius norm.

        ‖F(θ)‖₂ ≤ ‖G^(2^t)‖_F^(1 / 2^(t+1)),   G = F(θ)* F(θ),   G ← G G / ‖G‖_F² at every step,

    the maximum over the frequency grid of a circular operator as it stands. Everywhere else a maximum over a grid bounds the
    sampled frequencies only: it is multiplied by the factor of `cosine_grid`.

    Args:
        op: any operator.
        steps: squarings `t ≥ 0`. What they leave is at most a factor `rank^(1 / 2^(t+2))`: 1.016 for rank 64 and 6 steps.
        oversampling: as in `cosine_grid`; not for circular operators.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. Upper bound, differentiable everywhere but at ties between
        frequencies, without singular vectors.

    Cost: `O(N^d c³)` in float32, and `O(t c³)` in float64 for the few frequencies near the largest: one whose norm after some
        squarings is below the final norm of another is dropped. For a circular operator `N` is its input size.

    Raises:
        ValueError: an argument out of range, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.DenseOperator(torch.diag(torch.tensor([3.0, 3.0, 1.0])))
        >>> [round(sh.bounds.gram_iteration(op, steps=t).item(), 3) for t in (0, 2, 6)]
        [3.573, 3.133, 3.008]

    Source: Delattre, Barthélemy, Araujo and Allauzen (2023), who have it for circular convolutions.
    """
    check_oversampling(oversampling)
    check_steps(steps, least=0)

    def formula(kernel: Tensor) -> Tensor:
        sizes, factor = sampling(op, kernel, oversampling, own_grid=True)
        return _largest_iterated(kernel, sizes, steps) * factor

    return certified(op, formula)


def _largest_iterated(kernel: Tensor, sizes: tuple[int, ...], steps: int) -> Tensor:
    """The maximum of `_iterated` over groups and a frequency grid; differentiated at the winner.

    A value falls with every squaring. So what is, in float32 and with room for its rounding, below a final value drops out, and
    of the rest the final values are computed in float64.
    """
    if sizes and min(kernel.shape[1:3]) == 1:  # of rank one: nothing is left to be squared away
        return largest_frobenius(kernel, sizes)
    theta, _ = half_plane(sizes, kernel)
    best, where, group = kernel.new_tensor(-1.0), 0, 0
    with torch.no_grad():
        count = at_once(64 * prod(kernel.shape[:3]) + 40 * prod(kernel.shape[3:]))
        for start in range(0, len(theta), count):
            symbols = symbol(kernel, theta[start : start + count]).flatten(0, 1)
            symbols = symbols if sizes else symbols.real
            index, upper = _near_the_largest(symbols, steps, float(best))
            # one sorts out most, the others together
            for some in (upper.topk(min(1, len(upper))).indices, slice(None)):
                chosen = index[some][upper[some] >= float(best)]
                if len(chosen):
                    found, top = _iterated(symbols[chosen], steps).max(0)
                    if found > best:
                        best, (where, group) = found, divmod(int(chosen[top]), kernel.shape[0])
                        where += start
    if not kernel.requires_grad:
        return best
    block = symbol(kernel[group : group + 1], theta[where : where + 1])[0]
    return with_gradient(best, _iterated(block if sizes else block.real, steps)[0])


def _near_the_largest(symbols: Tensor, steps: int, best: float) -> tuple[Tensor, Tensor]:
    """Which of the symbols can have a value of `_iterated` above `best`, and what it is at most."""
    index = torch.arange(len(symbols), device=symbols.device)
    upper = torch.full_like(index, inf, dtype=torch.float64)
    if len(symbols) == 1:
        return index, upper
    rows, columns = sorted(symbols.shape[-2:])
    dtype = (torch.complex64 if symbols.is_complex() else torch.float32) if float32_is_kept() else symbols.dtype
    # a product is off by `√2 (m + 4) eps ‖F‖_F²`, and `‖F F*‖_F ≥ ‖F‖_F² / √n`; half of it counts, of the next a quarter, …
    room = 1 + 1.1 * SQRT2 * (columns + 4) * (sqrt(rows) + 1) * torch.finfo(dtype).eps
    gram, logs = _gram(symbols.to(dtype)), symbols.new_zeros(len(symbols), dtype=torch.float64)
    for step in range(steps + 1):
        gram, logs = _squared(gram, logs) if step else (gram, logs)
        upper = (_root(gram, logs, step) * room).clamp(min=_UNDERFLOW)
        if best < 0 and step == 1:  # to begin with
            best = float(_iterated(symbols[index[upper.argmax()]][None], steps))
        kept = upper >= best
        index, gram, logs, upper = index[kept], gram[kept], logs[kept], upper[kept]
    return index, upper


def _iterated(symbols: Tensor, steps: int) -> Tensor:
    """`‖G^(2^t)‖_F^(1 / 2^(t+1))` with `G = F F*`, for every matrix."""
    gram = _gram(symbols)
    logs = torch.zeros(gram.shape[:-2], dtype=torch.float64, device=gram.device)
    for _ in range(steps):
        gram, logs = _squared(gram, logs)
    return _root(gram, logs, steps)


def _gram(symbols: Tensor) -> Tensor:
    if symbols.shape[-2] > symbols.shape[-1]:
        symbols = symbols.mT
    return symbols @ symbols.mH


def _squared(gram: Tensor, logs: Tensor) -> tuple[Tensor, Tensor]:
    """The square of every matrix over its norm, and with it the logarithm of all that was divided out."""
    scale = squared_lengths(gram.detach()).sqrt()
    scale = torch.where(scale > 0, scale, 1)
    gram = gram / scale.to(gram.dtype)[..., None, None]
    return gram @ gram, 2 * (logs + scale.log())


def _root(gram: Tensor, logs: Tensor, steps: int) -> Tensor:
    """`(‖G_t‖_F e^logs)^(1 / 2^(t+1))`; zero for a matrix that is zero."""
    zero = (gram.detach() == 0).all(-1).all(-1)
    norms = squared_lengths(gram).clamp(min=1e-300).sqrt()
    return torch.where(zero, 0, ((norms.log() + logs) / 2 ** (steps + 1)).exp())
