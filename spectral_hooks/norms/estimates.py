"""Estimates of an operator's norm: cheap, differentiable, and certified by nothing.

`power_iteration` approaches the norm from below. `tensor_norm` and `reshaped_norm` are what the literature and the frameworks
compute, for comparison: either may lie on both sides. For a proof use `spectral_norm` or a function of `bounds`.
"""

from __future__ import annotations

from math import inf, prod, sqrt
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from ..linalg.krylov import matrix_norm, with_gradient
from ..linalg.precision import at_least_float32, exact
from ..linalg.scaling import normalized
from ..operators.arguments import on_kernel
from ..operators.base import KernelOperator, LinearOperator, is_whole
from .grid import grid_norm


class Power(NamedTuple):
    """The norm that a power iteration has reached, and the unit vector of shape `in_shape` to start the next one from."""

    norm: Tensor
    vector: Tensor


@overload
def power_iteration(
    op: LinearOperator | nn.Module,
    /,
    *,
    steps: int = ...,
    start: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_vector: Literal[False] = ...,
) -> Tensor: ...


@overload
def power_iteration(
    op: LinearOperator | nn.Module,
    /,
    *,
    steps: int = ...,
    start: Tensor | None = ...,
    generator: torch.Generator | None = ...,
    return_vector: Literal[True],
) -> Power: ...


@on_kernel
def power_iteration(
    op: KernelOperator,
    *,
    steps: int = 100,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
    return_vector: bool = False,
) -> Tensor | Power:
    """`‖A v‖` for the unit vector `v` that `v ← Aᵀ A v / ‖Aᵀ A v‖` reaches: from below.

    Matrix-free, by the operator and its adjoint, so for every padding. From a random start a convolution is 4 to 6 % short
    after 10 steps and 0.2 to 0.6 % after 100: its singular values lie close together. `spectral_norm` is faster to the same
    accuracy; this is for following a weight through training with a warm start.

    Args:
        op: a finite operator.
        steps: iterations, 0 for `‖A start‖`.
        start: a vector of shape `in_shape` to begin from, of any length: the one returned the last time. Random by default.
        generator: source of the random start; a fixed seed by default, so that the result is deterministic.
        return_vector: also return the vector.

    Returns:
        0-d tensor in the dtype of the weight, at least float32; with `return_vector` a pair `(norm, vector)`. An estimate, never
        above the norm by more than rounding in float64. Its gradient is that of `uᵀ A v` with `u` and `v` held fixed.

    Cost: `2 steps + 1` applications of the layer to one input.

    Raises:
        ValueError: the lattice operator (give an input size), a `start` of another shape, or that is zero or not finite,
            negative `steps`, NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        >>> op = sh.as_operator(conv, input_size=8)
        >>> norm, vector = sh.estimates.power_iteration(op, return_vector=True)
        >>> closer = sh.estimates.power_iteration(op, steps=10, start=vector)
        >>> bool(norm <= closer <= sh.spectral_norm(op) * 1.00001)
        True

    Source: Farnia, Zhang and Tse (2019) and Ryu et al. (2019), for convolutions.
    """
    if not is_whole(steps) or steps < 0:
        raise ValueError(f"`steps` must be an int, at least 0; got {steps!r}.")
    weight, dtype = op.weight, at_least_float32(op.dtype)
    plain, scale = normalized(weight.detach())
    vector = _iterated(op.with_weight(plain.to(op.device, dtype)), _unit_start(op, start, generator), steps)
    with torch.no_grad():
        # in float64, and cast down: what is returned is no more than the norm
        image = op.with_weight(plain).matvec(vector.to(plain))
        found = torch.linalg.vector_norm(image) / torch.linalg.vector_norm(vector.to(plain))
        norm = (found * scale).to(dtype)
        if float(norm) / scale > float(found):
            norm = torch.nextafter(norm, norm.new_tensor(-inf))
        norm = norm.to(op.device)
    if weight.requires_grad:
        left = (image / torch.linalg.vector_norm(image).clamp(min=1e-300)).to(op.device, dtype)
        norm = with_gradient(norm, (left * op.with_weight(weight.to(dtype)).matvec(vector)).sum())
    return Power(norm, vector) if return_vector else norm


def _unit_start(op: KernelOperator, start: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The given vector over its length, or a random one."""
    shape, dtype = op.in_shape, at_least_float32(op.dtype)
    if start is None:
        generator = generator or torch.Generator().manual_seed(0)
        vector = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype).to(op.device)
    elif tuple(start.shape) != shape:
        raise ValueError(f"`start` must have the operator's `in_shape` {shape}; got {tuple(start.shape)}.")
    else:
        vector = start.detach().to(op.device, dtype)
        vector = vector / vector.abs().amax()
        if not bool(torch.isfinite(vector).all()):
            raise ValueError("`start` must be finite and not zero: leave it out for a random start.")
    return vector / torch.linalg.vector_norm(vector)


@torch.no_grad()
def _iterated(op: KernelOperator, vector: Tensor, steps: int) -> Tensor:
    """The unit vector after so many applications of `Aᵀ A`."""
    for _ in range(steps):
        image = op.matvec(vector)
        image = op.rmatvec(image / torch.linalg.vector_norm(image).clamp(min=1e-30))
        length = torch.linalg.vector_norm(image)
        if not length > 0:  # an input that the layer does not see
            break
        vector = image / length
    return vector


@on_kernel
def tensor_norm(op: KernelOperator, *, steps: int = 100, starts: int = 8, generator: torch.Generator | None = None) -> Tensor:
    """The root of the number of taps times the spectral norm of the kernel as a tensor, as far as it is found.

        ‖A‖ ≤ √(k_1 ⋯ k_d) · ‖K‖_σ,   ‖K‖_σ = max |Σ K[i, j, t] u_i v_j Π_a w^a_{t_a}| over complex unit vectors

    The formula is an upper bound, tighter than `bounds.unfolding`. Its maximum is NP-hard; alternating rank-one steps (the
    higher-order power method) reach a local one. So what is returned is **not certified**: single starts have come out at
    0.66 of the lattice norm. Several random starts make that rarer, not impossible.

    Args:
        op: any operator; the kernel is the canonical one, the maximum over groups.
        steps: sweeps over all vectors.
        starts: random starts, of which the best counts.
        generator: source of the starts; a fixed seed by default, so that the result is deterministic.

    Returns:
        0-d tensor in the dtype of the weight, at least float32. An estimate of an upper bound. Its gradient is the outer product
        of the vectors.

    Cost: `O(steps · starts · c² k^d)`.

    Raises:
        ValueError: an argument out of range, or NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> round(sh.estimates.tensor_norm(sh.ConvOperator(torch.ones(1, 1, 3, 3))).item(), 4)
        9.0

    Source: Grishina, Gorbunov and Rakhuba (2024).
    """
    for name, number in (("steps", steps), ("starts", starts)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"`{name}` must be an int, at least 1; got {number!r}.")
    weight = op.weight
    _, scale = normalized(weight.detach())
    kernel = op.canonical()
    kernel = exact(kernel) / scale
    group, u, v, wave = _rank_one(kernel.detach(), steps, starts, generator)
    taps = kernel[group].flatten(0, 1).reshape(len(u) * len(v), -1)
    value = (torch.outer(u, v).flatten() @ taps.to(u) @ wave).abs()
    factor = sqrt(prod(kernel.shape[3:])) * op.padding_factor * scale
    return (value * factor).to(weight.device, torch.promote_types(weight.dtype, torch.float32))


@torch.no_grad()
def _rank_one(kernel: Tensor, steps: int, starts: int, generator: torch.Generator | None) -> tuple[int, Tensor, Tensor, Tensor]:
    """The best over groups and starts: the group, and its unit vectors `u`, `v` and wave `⊗ w`."""
    groups, rows, columns, *taps = kernel.shape
    generator = generator or torch.Generator().manual_seed(0)

    def draw(size: int) -> Tensor:
        parts = torch.randn(2, groups, starts, size, generator=generator, device=generator.device, dtype=torch.float64)
        return _unit(torch.complex(*parts).to(kernel.device))

    u, factors = draw(rows), [draw(size) for size in taps]
    by_rows = kernel.reshape(groups, rows, -1)
    by_columns = kernel.transpose(1, 2).reshape(groups, columns, -1)
    wave = _outer(factors, u)
    for _ in range(steps):
        v = _unit(_along(_contracted(u, by_rows, columns), wave).conj())
        seen = _contracted(v, by_columns, rows)
        u = _unit(_along(seen, wave).conj())
        # the kernel between u and v: a tensor of the taps alone
        core = (u.unsqueeze(-2) @ seen).squeeze(-2).reshape(groups, starts, *taps)
        for axis in range(len(taps)):
            rest = core.movedim(2 + axis, 2)
            for other in reversed([f for i, f in enumerate(factors) if i != axis]):
                rest = (rest * other.reshape(groups, starts, *[1] * (rest.ndim - 3), -1)).sum(-1)
            factors[axis] = _unit(rest.conj())
        wave = _outer(factors, u)
    values = (core.reshape(wave.shape) * wave).sum(-1).abs().flatten()
    group, best = divmod(int(values.argmax()), starts)
    return group, u[group, best], v[group, best], wave[group, best]


def _contracted(vectors: Tensor, kernel: Tensor, rows: int) -> Tensor:
    """Complex vectors `(groups, starts, n)` times a real kernel `(groups, n, rows · taps)`: `(groups, starts, rows, taps)`."""
    real, imag = (torch.cat([vectors.real, vectors.imag], 1) @ kernel).chunk(2, 1)
    return torch.complex(real, imag).unflatten(-1, (rows, -1))


def _along(seen: Tensor, wave: Tensor) -> Tensor:
    """What is left of `(groups, starts, rows, taps)` along the wave, `(groups, starts, rows)`."""
    return (seen @ wave.unsqueeze(-1)).squeeze(-1)


def _outer(factors: list[Tensor], like: Tensor) -> Tensor:
    """The outer product of one vector per axis, flat; one without axes."""
    wave = torch.ones(*like.shape[:2], 1, dtype=like.dtype, device=like.device)
    for factor in factors:
        wave = (wave.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
    return wave


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector, dim=-1, keepdim=True).clamp(min=1e-300)


@on_kernel
def reshaped_norm(op: KernelOperator) -> Tensor:
    """The largest singular value of the weight reshaped to a matrix: what torch's and Keras' spectral normalization divide by.

        ‖W‖₂,   W = weight.flatten(1), of shape `out × (in / groups · Π k)`; for transposed convolutions dimension 1 comes first.

    **Not the norm of the layer.** For an ungrouped convolution with zero padding it is at most the lattice norm, which can be
    `√(k_1 ⋯ k_d)` times as large; for grouped and transposed ones it can also lie above.

    Returns:
        0-d tensor in the dtype of the weight, at least float32: the limit of torch's power iteration, exact up to rounding.
        Differentiable where the top singular value is simple.

    Cost: the largest singular value of one matrix.

    Raises:
        ValueError: NaN or infinity in the weight.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> op = sh.ConvOperator(torch.ones(1, 1, 3, 3))
        >>> sh.estimates.reshaped_norm(op), sh.spectral_norm(op, rtol=1e-6)
        (tensor(3.), tensor(9.0000))

    Source: Miyato, Kataoka, Koyama and Yoshida (2018).
    """
    weight = op.weight
    _, scale = normalized(weight.detach())
    matrix = exact(weight) / scale
    if matrix.ndim > 2 and op.transposed:
        matrix = matrix.transpose(0, 1)
    matrix = matrix.flatten(1)
    norm = matrix.new_tensor(grid_norm(matrix[None], ()).value)
    if weight.requires_grad:
        norm = with_gradient(norm, matrix_norm(matrix))
    return (norm * scale).to(weight.device, torch.promote_types(weight.dtype, torch.float32))
