"""The symbol applied to vectors without being formed: one real product with the kernel for all frequencies together."""

from __future__ import annotations

from math import pi

import torch
from torch import Tensor

from .precision import float32_is_kept
from .scaling import normalized
from .symbols import product

#: From so many rows on some vectors are worth a look: by so many Krylov steps, for what is above by so much, where all components
#: are 0 or π, and elsewhere.
_SEEN_FROM, _GLANCES, _SEEN, _ELSEWHERE = 32, 6, 1e-4, (1.0, 2.2, 0.6)
#: Keeps the direction of a zero vector from being NaN.
_TINY = torch.finfo(torch.float32).tiny
_NOTHING = 16 * _TINY**0.5


class AppliedSymbol:
    """`v ↦ F(θ) v` and its adjoint for one vector at every frequency, of every group.

    `F(θ) v = Σ_t K_t (exp(-i t·θ) v)`: the taps times all vectors are one product, and there are far fewer taps than frequencies
    times rows. The symbols themselves would be read anew for every vector.
    """

    def __init__(self, kernel: Tensor, theta: Tensor) -> None:
        angles = product([torch.arange(k) for k in kernel.shape[3:]], theta) @ theta.T
        #: `exp(-i t·θ)`, `(taps, 1, frequencies)`.
        self._phases = torch.polar(torch.ones_like(angles), -angles).to(kernel.dtype.to_complex()).unsqueeze(1)
        self._taps = kernel.flatten(3).movedim(-1, 1).flatten(1, 2).contiguous()  # (groups, taps · rows, columns)
        self.shape = kernel.shape[:3]

    def __call__(self, vectors: Tensor) -> Tensor:
        """`(groups, columns, frequencies)` to `(groups, rows, frequencies)`."""
        images = _joined(self._taps @ _parted(vectors))
        return (images.unflatten(1, (len(self._phases), -1)) * self._phases).sum(1)

    def adjoint(self, vectors: Tensor) -> Tensor:
        """`(groups, rows, frequencies)` to `(groups, columns, frequencies)`."""
        turned = (vectors.unsqueeze(1) * self._phases.conj()).flatten(1, 2)
        return _joined(self._taps.mT @ _parted(turned))

    def start(self) -> Tensor:
        """A vector for every frequency, from which to start: images of what is alike in all rows, and differs in sign."""
        rows = torch.arange(self.shape[1], device=self._taps.device)
        start = torch.cos(rows.to(self._taps) ** 2 * 0.7)[None, :, None]
        return self.adjoint(start.expand(self.shape[0], -1, self._phases.shape[-1]).to(self._phases.dtype))

    def top(self, vectors: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Norms from below, `(groups, frequencies)`, by a few Krylov steps, and unit vectors that attain them."""
        basis: list[Tensor] = []
        images: list[Tensor] = []
        fresh = vectors
        for step in range(steps + 1):
            for _ in range(2 if basis else 0):
                for other in basis:
                    fresh = fresh - other * (other.conj() * fresh).sum(1, keepdim=True)
            length = torch.linalg.vector_norm(fresh, dim=1, keepdim=True)
            # of a symbol of rank one nothing is left after the first steps, and squares of less than this vanish: no direction
            basis.append(torch.where(length > _NOTHING, fresh / length.clamp(min=_NOTHING), 0.0))
            images.append(self(basis[-1]))
            if step < steps:
                fresh = self.adjoint(images[-1])
        stacked = torch.stack(images, -1).movedim(1, 2)  # (groups, frequencies, rows, steps)
        ritz = torch.linalg.eigh(stacked.mH @ stacked).eigenvectors[..., -1]
        found = (torch.stack(basis, -1) * ritz.unsqueeze(1)).sum(-1)
        length = torch.linalg.vector_norm(found, dim=1).clamp(min=_TINY)
        image = (stacked @ ritz.unsqueeze(-1)).squeeze(-1)
        return torch.linalg.vector_norm(image, dim=2) / length, found / length.unsqueeze(1)


def seen_above(kernel: Tensor, level: float) -> Tensor:
    """Which groups of a kernel some vectors show to have a norm above the level: far cheaper than a failing proof.

    In float32, so only what is above by more than its rounding; none of symbols of few rows, and where float32 is not kept.
    """
    seen = torch.zeros(len(kernel), dtype=torch.bool, device=kernel.device)
    if min(kernel.shape[1:3]) < _SEEN_FROM or kernel.ndim == 3 or not float32_is_kept():
        return seen
    kernel, scale = normalized(kernel.detach())
    if kernel.shape[1] > kernel.shape[2]:
        kernel = kernel.transpose(1, 2)
    ends = product([torch.tensor([0.0, pi])] * (kernel.ndim - 3), kernel)
    symbol = AppliedSymbol(kernel.float(), torch.cat([ends, kernel.new_tensor([_ELSEWHERE[: kernel.ndim - 3]])]).float())
    return symbol.top(symbol.start(), _GLANCES)[0].amax(1) > level / scale * (1 + _SEEN)


def _parted(vectors: Tensor) -> Tensor:
    """Real and imaginary parts as columns beside each other."""
    return torch.cat([vectors.real, vectors.imag], -1)


def _joined(columns: Tensor) -> Tensor:
    """Complex again."""
    return torch.complex(*columns.chunk(2, -1))
