"""The tightest bound for a small share of a layer's own cost: what `rescaled` measures in every training forward."""

from __future__ import annotations

from math import cos, inf, pi, prod, sqrt

import torch
from torch import Tensor

from ..linalg.lanczos import lanczos
from ..linalg.precision import at_least_float32, device_with_float64, full_precision, widest
from ..linalg.symbols import product, symbol
from ..operators.base import KernelOperator

#: Frequencies per axis of a grid over the kernel's degree `k - 1`, the finest first; in two dimensions 4 % and 17 % too much.
_OVERSAMPLING = (8, 4)
#: The most frequencies times channels over taps. The time of a grid over that of the layer's training step is proportional to
#: this number over the number of output positions in a batch.
_BUDGET = 400
#: Up to this size an eigenvalue solver is as fast as proofs by Cholesky.
_SMALL = 64
#: Beyond: what is tried to be proven, relative to an estimate of the squared norm.
_MARGINS = (1e-6, 2e-3, 0.1)
#: Krylov steps for that estimate.
_STEPS = 24
#: Keeps a zero weight from being divided by its norm.
_TINY = 1e-300


@full_precision
def quick(op: KernelOperator) -> Tensor:
    """The tightest bound for a small share of the layer's own cost, in tensor operations only.

    - A matrix, and a kernel that is one (a single tap after the polyphase form): the norm itself.
    - Up to 64 channels: the largest norm on a frequency grid times the cosine factor of `bounds.cosine_grid`, with 8 or 4 points
      over the degree per axis, as the budget allows; at most 4 % or 17 % above the norm in two dimensions.
    - Beyond: `√taps · ‖M‖₂` with `M` the kernel reshaped to `out × (in · taps)`, or `in × (out · taps)` if that has fewer rows;
      twice the norm for a random 3×3 kernel, at most `√taps` times.

    Matrices of more than 64 rows are measured by Krylov steps, and proven by Cholesky factors of `(1 + margin) σ² I - M Mᵀ`.
    All in float64. Nothing waits for a GPU, and a model with it compiles and exports as one graph.

    Returns:
        0-d tensor in float64. Upper bound; NaN for a weight that is not finite. Its gradient is that of the norm at the winner.

    Cost: with `n` the smaller number of channels, `O(frequencies · n³)`, in the last case `O(taps · n³)`; the gradient `O(n²)`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.norms.quick import quick
        >>> op = sh.as_operator(torch.nn.Conv2d(4, 8, 3))
        >>> norm = sh.spectral_norm(op, rtol=1e-6).detach()
        >>> bool(norm / 1.000001 <= quick(op) <= 1.04 * norm)
        True
    """
    kernel = op.canonical()
    kernel = kernel.to(at_least_float32(kernel.dtype))
    if kernel.shape[1] > kernel.shape[2]:
        kernel = kernel.transpose(1, 2)
    sizes, factor = sampling_grid(kernel)
    if not sizes:
        kernel = kernel.flatten(2)
    # of two conjugate frequencies one is enough
    theta = product(
        [torch.arange(n if i else n // 2 + 1) * (2 * pi / n) for i, n in enumerate(sizes)], torch.empty(0, dtype=torch.float64)
    )
    index, left, right, upper = _largest(kernel.detach(), theta)
    # at the winner, with the vectors held fixed: the derivative of a maximum
    group, place = index % len(kernel), torch.div(index, len(kernel), rounding_mode="floor")
    block = _blocks(_pick(kernel, group), _pick(theta.to(kernel), place))[0]
    norm = (left.to(block.dtype) @ block @ right.to(block.dtype)).real.to(upper.dtype)
    rounding = 1 + 1e-14 * (kernel[0].numel() + 100)
    return norm * (upper / norm.detach().clamp(min=_TINY) * (factor * op.padding_factor * rounding))


def sampling_grid(kernel: Tensor) -> tuple[list[int], float]:
    """Frequencies per axis and the factor that makes a bound of their maximum; none where the reshaped kernel has to do."""
    degrees = [k - 1 for k in kernel.shape[3:]]
    taps = prod(kernel.shape[3:])
    for oversampling in _OVERSAMPLING:
        sizes = [max(oversampling * degree, 1) for degree in degrees]
        if 1 < prod(sizes) <= 2 * _BUDGET * taps / kernel.shape[1] and kernel.shape[1] <= _SMALL:
            return sizes, prod([1 / cos(pi * degree / (2 * n)) for degree, n in zip(degrees, sizes, strict=True)])
    return [], sqrt(taps)


def _blocks(kernel: Tensor, theta: Tensor) -> Tensor:
    """The symbol at these frequencies, `(frequencies · groups, rows, columns)`; matrices as they are."""
    return symbol(kernel, theta).flatten(0, 1) if theta.shape[1] else kernel


def _pick(items: Tensor, index: Tensor) -> Tensor:
    """The item at an index of shape 1; no copy where there is one only."""
    return items if len(items) == 1 else items.index_select(0, index)


# One node in the graph of a compiled or exported model; its results are taken as constants.
@torch.library.custom_op(
    "spectral_hooks::largest", mutates_args=(), schema="(Tensor kernel, Tensor theta) -> (Tensor, Tensor, Tensor, Tensor)"
)
def _largest(kernel: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which block has the largest norm (an index of shape 1), its singular vectors `u*` and `v`, and a bound of the norm."""
    device, dtype = kernel.device, widest(kernel.device)
    kernel = kernel.to(device_with_float64(device))
    scale = torch.linalg.vector_norm(kernel, inf).to(torch.float64).clamp(min=_TINY)
    kernel = kernel.to(torch.float64) / scale
    blocks = _blocks(kernel, theta.to(kernel))
    # solvers raise on NaN; the scale carries it to the result
    grams = torch.nan_to_num(blocks @ blocks.mH)
    size = grams.shape[-1]
    if size > _SMALL:
        # from a fixed start that no matrix of a model is blind to
        start = torch.arange(1, size + 1, device=grams.device).mul(1.618).cos().to(grams)
        values, vectors = lanczos(grams, grams @ start, _STEPS)
        squared = _proven(grams, values.amax())
        index = values.argmax(0, keepdim=True)
        left = _pick(vectors, index)[0]
    else:
        values = torch.linalg.eigvalsh(grams)[:, -1] if size > 1 else grams[:, 0, 0].real
        squared = values.amax().clamp(min=0)
        index = values.argmax(0, keepdim=True)
        left = torch.linalg.eigh(_pick(grams, index)).eigenvectors[0, :, -1]
    # conjugates are written out: a lazy one is lost in a product with a vector when this is called from a compiled graph
    left = left.conj().resolve_conj().clone()
    row = left @ _pick(blocks, index)[0]
    right = (row / torch.linalg.vector_norm(row).clamp(min=_TINY)).conj().resolve_conj().clone()
    return index.to(device), left.to(device), right.to(device), (squared.sqrt() * scale).to(device, dtype)


@_largest.register_fake
def _(kernel: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    vector = torch.complex128 if theta.shape[1] else torch.float64
    left, right = (kernel.new_empty(n, dtype=vector) for n in kernel.shape[1:3])
    return kernel.new_empty(1, dtype=torch.long), left, right, kernel.new_empty((), dtype=widest(kernel.device))


def _proven(grams: Tensor, estimate: Tensor) -> Tensor:
    """A number that no eigenvalue exceeds: the estimate with the smallest margin for which all matrices have a factor.

    In place of `linalg.cholesky.below`, which counts its rounding, but looks at values after every panel: in every forward a GPU
    would have to be waited for.
    """
    upper = torch.linalg.vector_norm(grams.flatten(1), dim=1).amax()
    identity = torch.eye(grams.shape[-1], dtype=grams.dtype, device=grams.device)
    for margin in _MARGINS:
        level = estimate * (1 + margin)
        proven = (torch.linalg.cholesky_ex(level * identity - grams).info == 0).all()
        upper = torch.where(proven, torch.minimum(level, upper), upper)
        # elsewhere it would take longer to wait for the answer than to try the others
        if grams.device.type == "cpu" and proven:
            break
    return upper
