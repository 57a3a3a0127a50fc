"""linalg.top: what it proves is never below the norm, and near."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from spectral_hooks.linalg.top import proven_top

SIZES = [(1, 2, 5), (1, 7, 7), (1, 70, 150), (5, 20, 20), (1, 200, 200), (34, 40, 64)]


def spectra(number: int, rows: int, columns: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Matrices whose largest entry is of order one, with spectra from no gap at all to a single value."""
    generator = torch.Generator().manual_seed(0)

    def frames(size: int) -> Tensor:
        return torch.linalg.qr(torch.randn(number, size, size, generator=generator, dtype=torch.float64).to(dtype)).Q

    u, v = frames(rows), frames(columns)[..., :rows].mH
    ramp = torch.linspace(0.1, 1, rows, dtype=torch.float64)
    values = {
        "equal": torch.ones(rows, dtype=torch.float64),
        "nearly equal": 1 - 1e-3 * ramp,
        "two": 1 - 0.3 * (torch.arange(rows) > 1).double(),
        "linear": ramp,
        "falling": (-torch.arange(rows) / 4.0).double().exp(),
        "one": (torch.arange(rows) == 0).double(),
    }
    made = {name: (u * s.to(dtype)) @ v for name, s in values.items()}
    made["random"] = torch.randn(number, rows, columns, generator=generator, dtype=torch.float64).to(dtype)
    made["one entry"] = torch.zeros(number, rows, columns, dtype=dtype)
    made["one entry"][:, rows // 2, columns // 3] = 1
    return {name: x / x.abs().max() for name, x in made.items()}


@pytest.mark.parametrize("complex", [False, True])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_never_below_the_norm_and_near(shape: tuple[int, int, int], complex: bool) -> None:
    for name, wide in spectra(*shape, torch.complex128 if complex else torch.float64).items():
        for dtype in (torch.float64, torch.float32):
            matrices = wide.to(dtype.to_complex() if complex else dtype)
            norms = torch.linalg.svdvals(matrices.to(wide.dtype))[:, 0]
            found = proven_top(matrices.split(16), 2e-3)
            if found is None:  # so many equal values leave too much to the rounding of float32
                assert dtype == torch.float32, name
                assert shape[1] > 100, name
                continue
            top, squared = found
            assert squared >= float(norms.max()) ** 2, name
            assert squared**0.5 <= float(norms.max()) * (1.000002 if dtype == torch.float64 else 1.002), name
            assert float(norms[top.place]) >= float(norms.max()) * (1 - 2e-3), name
            # a unit vector that attains it, about
            attained = torch.linalg.vector_norm(top.left.conj().to(wide.dtype) @ matrices[top.place].to(wide.dtype))
            assert float(attained) >= float(norms.max()) * (1 - 2e-3), name


def test_a_matrix_that_is_overlooked_at_first_is_found() -> None:
    """The start is blind to it: no proof passes over it all the same."""
    size = 40
    start = torch.arange(1, size + 1, dtype=torch.float64).mul(1.618).cos()
    hidden = torch.linalg.svd(start.unsqueeze(0)).Vh[1:2]  # orthogonal to the start
    eye = torch.eye(size, dtype=torch.float64)
    matrices = torch.stack([0.9 * eye, 0.1 * eye + 0.9 * hidden.mT @ hidden])
    found = proven_top([matrices], 1e-3)
    assert found is None or found[1] >= 1 - 1e-12
    single = proven_top([matrices[1:].float()], 2e-3)
    assert single is None or single[1] >= 1 - 1e-6


def test_too_much_rounding_is_told() -> None:
    torch.manual_seed(0)
    matrix = torch.linalg.qr(torch.randn(300, 300)).Q.unsqueeze(0) * 10
    assert proven_top([matrix], 1e-6) is None
    assert proven_top([matrix.double()], 1e-6) is not None


@pytest.mark.parametrize("share", [0.0, 1e-25, 1e-42])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_a_matrix_that_is_zero_or_nearly_is_no_hindrance(dtype: torch.dtype, share: float) -> None:
    matrix = torch.randn(20, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = (matrix / matrix.abs().max()).to(dtype)
    norm = float(torch.linalg.matrix_norm(matrix.to(torch.complex128), 2))
    found = proven_top([torch.stack([matrix * share, matrix])], 2e-3)
    assert found is not None
    top, squared = found
    assert top.place == 1
    assert norm <= squared**0.5 <= norm * 1.001


def test_a_matrix_of_one_entry_among_others_that_nearly_vanish() -> None:
    """Of its Krylov space a decomposition in single precision may make no numbers: what the power steps have found will do."""
    matrix = torch.full((1, 20, 132), 1e-30)
    matrix[0, 0, 0] = 1
    for matrices in (matrix, matrix.to(torch.complex64), matrix[:, :, :33].to(torch.complex64).repeat(16, 1, 1)):
        found = proven_top([matrices], 2e-3)
        assert found is not None
        assert 1 <= found[1] <= 1.004
