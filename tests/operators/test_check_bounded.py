"""`check_bounded` says what keeps an operator from having a bound without an input size."""

from __future__ import annotations

import pytest
from cases import FEW_CONVS, MATRICES, Case
from torch import nn

import spectral_hooks as sh


@pytest.mark.parametrize("case", FEW_CONVS, ids=str)
def test_convolutions(case: Case) -> None:
    layer = case.layer()
    op = sh.as_operator(layer)
    if case.mode in ("reflect", "replicate"):
        with pytest.raises(ValueError, match="`input_size=`"):
            op.check_bounded()
    else:
        assert op.check_bounded() is None
    assert sh.as_operator(layer, input_size=case.size).check_bounded() is None


@pytest.mark.parametrize("shape", MATRICES, ids=str)
def test_matrices(shape: tuple[int, int]) -> None:
    assert sh.as_operator(nn.Linear(*shape)).check_bounded() is None
