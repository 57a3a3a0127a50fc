"""Weights to start from whose layers keep the length of a signal, and whether a whole network does."""

from __future__ import annotations

from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ..operators import ConvOperator, as_operator
from ..operators.base import is_number
from ..parametrizations.block_conv import Blocks, compose
from ..parametrizations.stiefel import polar_factor
from .writing import write_


@torch.no_grad()
def orthogonal_(layer: nn.Module, gain: float = 1.0, *, generator: torch.Generator | None = None) -> nn.Module:
    """Give a layer a random orthogonal weight, in place: all singular values of its operator are `gain`.

    Linear: uniform (Haar) among the matrices with orthonormal rows or columns. Convolution: a product of random projector pairs,
    orthogonal for circular padding and on the lattice, of norm at most `gain` with zero padding. `torch.nn.init.orthogonal_`
    instead makes the kernel an orthogonal matrix after reshaping it to `out × (in · taps)`, whose operator is not.

    Args:
        layer: linear or convolutional, of any stride, dilation and groups; the bias stays.
        gain: the singular values, `≥ 0`.
        generator: where the randomness comes from.

    Returns:
        The layer.

    Raises:
        ValueError: `gain` is no such number; padding that repeats inputs.
        ValueError, TypeError, NotImplementedError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.weights.initializers import orthogonal_
        >>> conv = orthogonal_(torch.nn.Conv2d(4, 8, 3, bias=False), generator=torch.Generator().manual_seed(0))
        >>> values = sh.singular_values(sh.as_operator(conv).circular(6))
        >>> bool((values - 1).abs().max() < 1e-5)
        True

    Source: Saxe, McClelland and Ganguli (2014); kernels: Li et al. (2019).
    """
    gain = _check_gain(gain)
    op = as_operator(layer)
    op.check_bounded()
    if isinstance(op, ConvOperator):
        blocks = Blocks.of(op.weight.shape, op.groups, op.stride, op.dilation)
        weight = compose(blocks, {name: _uniform(shape, op.weight, generator) for name, shape in blocks.shapes.items()})
    else:
        weight = _uniform(tuple(op.weight.shape), op.weight, generator)
    write_(layer, (gain * weight).to(op.weight.dtype))
    return layer


@torch.no_grad()
def delta_orthogonal_(layer: nn.Module, gain: float = 1.0, *, generator: torch.Generator | None = None) -> nn.Module:
    """Give a convolution a kernel that is zero but for a random orthogonal matrix in its middle, in place.

    Norm `gain` with any padding; at stride 1 with "same" padding all singular values are `gain`, zero padding included: nothing
    is moved, so nothing is lost at the border. With a stride only every s-th position is read. Kernels of even size have the tap
    after the middle.

    Args:
        layer: a convolution, or a linear layer, for which this is `orthogonal_`; the bias stays.
        gain: the singular values, `≥ 0`.
        generator: where the randomness comes from.

    Returns:
        The layer.

    Raises:
        ValueError: `gain` is no such number; padding that repeats inputs.
        ValueError, TypeError, NotImplementedError: as `as_operator`.

    Example:
        >>> import torch, spectral_hooks as sh
        >>> from spectral_hooks.weights.initializers import delta_orthogonal_
        >>> conv = delta_orthogonal_(torch.nn.Conv2d(4, 8, 3, padding=1))
        >>> values = sh.singular_values(sh.as_operator(conv, input_size=(5, 5)))
        >>> bool((values - 1).abs().max() < 1e-5)
        True

    Source: Xiao, Bahri, Sohl-Dickstein, Schoenholz and Pennington (2018).
    """
    gain = _check_gain(gain)
    op = as_operator(layer)
    if not isinstance(op, ConvOperator):
        return orthogonal_(layer, gain, generator=generator)
    op.check_bounded()
    rows, columns, *taps = op.weight.shape
    weight = torch.zeros_like(op.weight)
    middle = _uniform((op.groups, rows // op.groups, columns), op.weight, generator).flatten(0, 1)
    index: tuple[Any, ...] = (..., *(k // 2 for k in taps))
    weight[index] = (gain * middle).to(weight.dtype)
    write_(layer, weight)
    return layer


def jacobian_singular_values(model: nn.Module, example: Tensor) -> Tensor:
    """The singular values of a network's input-output Jacobian at each of some inputs, `σ(∂f(x)/∂x)`.

    Under dynamical isometry all are near 1: a signal and its gradient keep their length through the whole network. They are exact
    up to rounding, at these inputs only, with the model in evaluation mode, in which it is put for the call.

    Args:
        model: from a batch to a batch of outputs, floating point; each output depends on its own input alone.
        example: inputs, `(batch, *shape)`.

    Returns:
        `(batch, min(numel(input), numel(output)))`, descending, in the dtype of the outputs, at least float32.

    Cost: a backward of the batch for every entry of an output, and an SVD per input.

    Raises:
        TypeError: the example is no floating-point tensor.
        ValueError: the outputs are no batch of the same size.

    Example:
        >>> import torch
        >>> from spectral_hooks.weights.initializers import delta_orthogonal_, jacobian_singular_values
        >>> model = torch.nn.Sequential(*[delta_orthogonal_(torch.nn.Conv2d(3, 3, 3, padding=1)) for _ in range(20)])
        >>> values = jacobian_singular_values(model, torch.randn(2, 3, 4, 4))
        >>> values.shape, bool((values - 1).abs().max() < 1e-4)
        (torch.Size([2, 48]), True)

    Source: Pennington, Schoenholz and Ganguli (2017).
    """
    if not isinstance(example, Tensor) or not example.is_floating_point():
        kind = example.dtype if isinstance(example, Tensor) else type(example).__name__
        raise TypeError(f"`example` must be a floating-point tensor (batch, *shape); got {kind}.")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            x = example.detach().clone().requires_grad_()
            y = model(x)
            if y.ndim < 2 or len(y) != len(x):
                raise ValueError(
                    f"`model` must give an output (batch, ...) for each of the {len(x)} inputs; got shape {tuple(y.shape)}."
                )
            # outputs of one input do not depend on the others, so a sum over the batch tells them apart
            rows = [torch.autograd.grad(entry, x, retain_graph=True)[0].flatten(1) for entry in y.flatten(1).sum(0)]
    finally:
        for module, mode in modes.items():
            module.training = mode
    jacobian = torch.stack(rows, 1)
    return torch.linalg.svdvals(jacobian.to(torch.promote_types(jacobian.dtype, torch.float32)))


def _check_gain(gain: float) -> float:
    if not is_number(gain) or not (isfinite(gain) and gain >= 0):
        raise ValueError(f"`gain` must be a finite number, 0 or more: it is the singular values; got {gain!r}.")
    return float(gain)


def _uniform(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Uniform among the matrices with orthonormal rows or columns: the polar factor of a Gaussian one."""
    device = like.device if generator is None else generator.device
    return polar_factor(torch.randn(shape, dtype=torch.float64, generator=generator, device=device)).to(like.device)
