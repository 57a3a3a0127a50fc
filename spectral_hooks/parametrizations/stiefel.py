"""Maps from free tensors to orthonormal columns: the Stiefel manifold `{Q : p × q, QᵀQ = I}`, `p ≥ q`.

Each map takes a real tensor `(*batch, p, q)` to one of the same shape with orthonormal columns, exact up to rounding for every
finite tensor, zero and 1e30 alike, with a finite derivative, without a look at any value (so it compiles), at a cost of
`O(p q²)`. Half precision is computed in float32 and cast at the end; autocast does not reach inside.

`cayley_transform` and `exponential` start from a frame `base`, by default the first `q` columns of the identity: zero is mapped
to it, and there the derivative is the projection on the tangent space. They reach every frame near it, and take long tensors
`bounded`.
`qr` and `householder` reach every frame. `origin` gives what maps to a given frame, for each of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg.orthonormal import polished
from ..linalg.precision import in_full_precision, widest
from .recording import held

#: Up to this length a tensor is taken as it is, and none as more than twice as long. The matrix that `cayley_transform` inverts
#: then has a norm of at most 8,300: in float32 an error of up to 5e-3 is left to polish, which takes it to some 2e-7.
FAR = 128.0


def bounded(x: Tensor, most: float = FAR) -> Tensor:
    """Matrices as they are where they are short, and in the same direction but no longer than `2 most` where they are not.

        x ↦ t (2 - t) x,   t = min(1, most / r),   r = ‖xᵀx‖_F^½ ≥ ‖x‖₂

    So the length becomes `most (2 - most / r) < 2 most`: one-to-one, with a continuous derivative that is nowhere zero, and
    the identity, bit for bit, for `r ≤ most`. `r` exceeds the norm by no more than `q^¼`. Nothing overflows.

    Args:
        x: `(*batch, p, q)`, finite; `p ≥ q` is cheaper.
        most: the length up to which nothing changes.
    """
    # in a unit of length in which no square overflows; what it is makes no difference to the result
    unit = (held(x).abs().amax((-2, -1), keepdim=True) / most).clamp(min=1)
    y = x / unit
    gram = torch.linalg.vector_norm(y.mH @ y, dim=(-2, -1), keepdim=True)
    # clamped before the root, which has no derivative at zero
    t = most / gram.clamp(min=(most / unit).square()).sqrt()  # times the unit
    return y * (t * (2 - t / unit))


@in_full_precision
def cayley_transform(x: Tensor, base: Tensor | None = None) -> Tensor:
    """The Cayley transform of a tangent vector at a frame.

        Q = (Y + V/2) B⁻¹ - Y,   B = I/2 - (U - Uᵀ)/8 + VᵀV/8,   U = Yᵀx,  V = x - YU,

    which is `(I - L/2)⁻¹ (I + L/2) Y` for the skew `p × p` matrix `L` with `L Y = V + Y (U - Uᵀ) / 2`. Square: `V` is zero and
    `x` is taken in the coordinates of `Y`, `U = x`. One `q × q` system, whose matrix has no singular value below 1/2. Since
    `QᵀQ - I = X (BX - I) + its transpose` for `X` in place of `B⁻¹`, rounding takes from orthogonality what it takes from the
    solution of that system, `ε ‖B‖`, and `x` is `bounded` for that.

    Args:
        x: free, `(*batch, p, q)`, `p ≥ q`.
        base: `Y`, orthonormal columns of the same shape; by default those of the identity.

    Returns:
        Orthonormal columns, of the shape and dtype of `x`. Exact up to rounding. All frames near `Y` are reached: those for which
        `YᵀQ` has no eigenvalue -1.

    Example:
        >>> import torch
        >>> from spectral_hooks.parametrizations.stiefel import cayley_transform
        >>> q = cayley_transform(torch.randn(7, 3, dtype=torch.float64))
        >>> torch.allclose(q.T @ q, torch.eye(3, dtype=torch.float64))
        True

    Source: Cayley (1846); on the Stiefel manifold Wen and Yin (2013).
    """
    p, q = x.shape[-2:]
    x = bounded(x)
    eye = torch.eye(q, dtype=x.dtype, device=x.device)
    if p == q:
        base = _identity(x) if base is None else base
        b = torch.add(eye / 2, x.mT - x, alpha=1 / 8)
        return polished(torch.linalg.solve(b, base, left=False) - base)
    if base is None:  # U stands on top of V
        u, v = x.tensor_split((q,), -2)
        inverse = torch.linalg.inv(torch.add(eye / 2, u.mT - u + v.mT @ v, alpha=1 / 8))
        return polished(torch.cat([inverse - eye, v @ inverse / 2], -2))
    u = base.mT @ x
    v = x - base @ u
    b = torch.add(eye / 2, u.mT - u + v.mT @ v, alpha=1 / 8)
    return polished(torch.linalg.solve(b, base + v / 2, left=False) - base)


@in_full_precision
def exponential(x: Tensor, base: Tensor | None = None) -> Tensor:
    """The geodesic from a frame along a tangent vector: `Q = exp(L) Y`, with the skew `L` of `cayley_transform`.

    Square: `Q = Y exp((x - xᵀ) / 2)`. Tall: `L = [W, Y] [Y, -W]ᵀ` has rank `2q`, so an exponential of `3q × 3q` is enough.

    Args:
        x: free, `(*batch, p, q)`, `p ≥ q`.
        base: `Y`, orthonormal columns of the same shape; by default those of the identity.

    Returns:
        Orthonormal columns, of the shape and dtype of `x`; exact up to rounding. Square: all with the determinant of `Y`.

    Source: Edelman, Arias and Smith (1998).
    """
    p, q = x.shape[-2:]
    x = bounded(x)
    base = _identity(x) if base is None else base
    if p == q:
        return polished(base @ torch.linalg.matrix_exp((x - x.mT) / 2))
    u = base.mT @ x
    half = (u - u.mT) / 4
    w = x - base @ (u - half)
    # both halves of the factors of L alike in size, for the accuracy of the exponential
    scale = torch.linalg.vector_norm(w.detach(), dim=(-2, -1), keepdim=True).clamp(min=1).sqrt()
    left, right = torch.cat([w / scale, base * scale], -1), torch.cat([base * scale, -w / scale], -1)
    # exp(A Bᵀ) Y = Y + A φ(BᵀA) BᵀY with φ(z) = (eᶻ - 1) / z, the corner of the exponential of [[BᵀA, BᵀY], [0, 0]]
    top = torch.cat([right.mT @ left, right.mT @ base], -1)
    block = torch.cat([top, top.new_zeros(*top.shape[:-2], q, 3 * q)], -2)
    return polished(base + left @ torch.linalg.matrix_exp(block)[..., : 2 * q, 2 * q :])


@in_full_precision
def qr(x: Tensor) -> Tensor:
    """`Q` of `x = QR` with a positive diagonal of `R`: Gram-Schmidt.

    Args:
        x: free, `(*batch, p, q)`, `p ≥ q`.

    Returns:
        Orthonormal columns, of the shape and dtype of `x`. Exact up to rounding. A frame is mapped to itself, so all are reached.
        Where the columns depend on each other there is no derivative; `R` is divided by as if its singular values `σ` were
        `√(σ² + δ²)`, with `δ²` the rounding relative to entries above 1.
    """
    fixed = held(x)
    with torch.no_grad():
        unit = fixed.abs().amax((-2, -1), keepdim=True).clamp(min=1)
        q, r = torch.linalg.qr(fixed / unit)
        # a triangle whose singular values are √(σ² + δ²), with δ² the rounding
        delta = torch.finfo(x.dtype).eps ** 0.5 * torch.eye(r.shape[-1]).to(r)
        _, apart = torch.linalg.qr(torch.cat([r * _signs(r).unsqueeze(-1), delta.expand_as(r)], -2))
        apart = apart * _signs(apart).unsqueeze(-1)
        step = torch.linalg.solve_triangular(apart, torch.eye(r.shape[-1]).to(r), upper=True) / unit
        q = q * _signs(r).unsqueeze(-2)
    # the same Q for x R⁻¹, whose own triangle is the identity: derivatives of every order have nothing small to divide by
    frame, triangle = torch.linalg.qr(q + (x - fixed) @ step)
    return polished(frame) * _signs(triangle).unsqueeze(-2)


@in_full_precision
def householder(x: Tensor) -> Tensor:
    """The product of `q` reflections: `Q = (I - V T Vᵀ)[:, :q] D`.

    `V` is `x` below the diagonal with ones on it, each column then divided by its length, `T⁻¹` the upper triangle of `VᵀV` with
    half of its diagonal, and `D` minus the signs of the diagonal of `x` (zero counts as positive), so that zero is mapped to
    columns of the identity. The upper triangle is not used.

    An entry of `T` is `4 vᵢᵀ H … H vⱼ` with reflections `H` in between, so at most 4: no `x` makes the system ill-conditioned.

    Args:
        x: free, `(*batch, p, q)`, `p ≥ q`.

    Returns:
        Orthonormal columns, of the shape and dtype of `x`. Exact up to rounding; every frame is reached.

    Source: Schreiber and Van Loan (1989); the triangle: Joffrain et al. (2006).
    """
    q = x.shape[-1]
    v = x.tril(-1) + _identity(x)
    v = v / lengths(v)
    gram = v.mT @ v
    t = gram.triu(1) + torch.eye(q, dtype=x.dtype, device=x.device) / 2
    product = _identity(x) - v @ torch.linalg.solve_triangular(t, v[..., :q, :].mT, upper=True)
    return polished(product) * -_signs(x).unsqueeze(-2)


#: Every map by its name, and whether it takes a base. The latter start at zero.
MAPS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "cayley": (cayley_transform, True),
    "qr": (qr, False),
    "exp": (exponential, True),
    "householder": (householder, False),
}


@torch.no_grad()
def origin(name: str, frame: Tensor) -> tuple[Tensor, Tensor | None]:
    """A free tensor that a map takes to a frame, and the base that it takes for it, if any.

    Args:
        name: one of `MAPS`.
        frame: orthonormal columns, `(*batch, p, q)`.

    Returns:
        `x, base` with `map(x, base) = frame`, or `map(x) = frame` where `base` is None.
    """
    if MAPS[name][1]:
        return torch.zeros_like(frame), frame.clone()
    if name == "qr":
        return frame.clone(), None
    reflectors, _ = torch.geqrf(frame)
    # The diagonal is that of R, which is one of signs: Q = (the product) R. LAPACK leaves out a reflection that would change
    # nothing (only of the last column of a square one); `householder` never does.
    signs = householder(reflectors).mul(frame).sum(-2)
    diagonal = torch.diagonal(reflectors, dim1=-2, dim2=-1)
    diagonal.copy_(_signs(reflectors) * torch.where(signs < 0, -1.0, 1.0).to(frame))
    return reflectors.tril(), None


def inverse_cayley(frame: Tensor, base: Tensor | None = None) -> Tensor:
    """The `x` with `cayley_transform(x, base) = frame`, where it exists: `YᵀQ` without eigenvalue -1."""
    p, q = frame.shape[-2:]
    base = _identity(frame) if base is None else base
    top = base.mT @ frame
    b = 8 * torch.linalg.inv(top + torch.eye(q, dtype=frame.dtype, device=frame.device))
    u = (b.mT - b) / 4
    return u if p == q else base @ u + (frame - base @ top) @ b / 4


def polar_factor(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, or rows of a wide one: `UVᵀ` of `x = UΣVᵀ`, whatever the length of `x`.

    In float64, differentiable where it is unique. `skew` has one with a finite derivative everywhere.

    Args:
        x: `(*batch, p, q)`. Where its rank is less than `min(p, q)`, one of many nearest ones.

    Source: Fan and Hoffman (1955).
    """
    u, _, vh = torch.linalg.svd(x.to(widest(x.device)), full_matrices=False)
    return (u @ vh).to(x.dtype)


def lengths(v: Tensor) -> Tensor:
    """Of the columns of a matrix with an entry of one in each, `(*batch, 1, q)`; no square overflows."""
    largest = held(v).abs().amax(-2, keepdim=True)
    return torch.linalg.vector_norm(v / largest, dim=-2, keepdim=True) * largest


def _identity(x: Tensor) -> Tensor:
    return torch.eye(*x.shape[-2:], dtype=x.dtype, device=x.device).expand_as(x)


def _signs(x: Tensor) -> Tensor:
    """Signs of the diagonal, where zero is positive: never a column of zeros."""
    diagonal = x.detach().diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal < 0, -1.0, 1.0).to(x)
