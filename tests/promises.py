"""What the library promises, each promise as a function that attacks it: a generator -> by how much it was broken.

`excess` is relative, and positive where the promise is broken: `norm / bound - 1`. Only `TOLERANCE` of it counts as rounding. An
error for an input that is allowed breaks a promise too. `PROMISES` is the list; `fuzz.py` and `test_guarantees.py` run it.
"""

from __future__ import annotations

import copy
import traceback
import warnings
import zlib
from collections.abc import Callable
from functools import partial
from math import inf, isfinite, prod, sqrt
from typing import Any, NamedTuple

import attacks
import numpy as np
import observers
import torch
from attacks import Rng, pick, shown
from cases import BOUNDS
from torch import Tensor, nn

import spectral_hooks as sh

#: What rounding may add to a certified result, relative; the contract's own.
TOLERANCE = 1e-6
#: A comparison of the reference with itself: rounding in float64.
_EXACT = 1e-9


class Margin(NamedTuple):
    """By how much a promise was broken, relative, negative where there was room; and the input."""

    excess: float
    about: str


Promise = Callable[[Rng], Margin]


def attack(promise: Promise, seed: int) -> Margin:
    """One attack, the same for the same seed; an exception counts as an infinite excess."""
    rng = np.random.default_rng([zlib.crc32(promise.__name__.encode()), seed])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return promise(rng)
        except Exception as error:
            frames = list(traceback.walk_tb(error.__traceback__))
            last = frames[-1][0]
            # the promise keeps what it attacks in a variable of this name
            inputs = [frame.f_locals["about"] for frame, _ in frames if "about" in frame.f_locals]
            line = f"{last.f_code.co_filename.rpartition('/')[2]}:{frames[-1][1]}"
            return Margin(inf, f"{type(error).__name__}: {error} ({line}); {inputs[-1] if inputs else ''}")


def is_broken(margin: Margin) -> bool:
    """NaN is broken too."""
    return not margin.excess <= TOLERANCE


def _over(value: float, limit: float) -> float:
    """`value / limit - 1`: how far a value that should not exceed a limit does."""
    if value == 0 or value <= limit * 1e-300:
        return -1.0
    if not isfinite(limit):
        return -1.0 if limit == inf else inf
    return value / limit - 1 if limit else inf


def _norm(layer: Any) -> float:
    """Of the lattice or the matrix."""
    return observers.lattice_norm(layer)


def _layer(rng: Rng, dtype: torch.dtype, **options: Any) -> Any:
    """A matrix or a convolution with zero padding."""
    if rng.random() < 0.25:
        return attacks.linear(rng, dtype, extreme=options.get("extreme", 0.4))
    return attacks.convolution(rng, dtype, **options)


def _representable(norm: float, dtype: torch.dtype) -> bool:
    """Whether the dtype of results has room for a norm and for its digits."""
    info = torch.finfo(torch.promote_types(dtype, torch.float32))
    return info.tiny * 2 < norm < info.max / 2


# -- operators, norms, bounds ------------------------------------------------------------------------------------------------


def operator_is_the_layer(rng: Rng) -> Margin:
    """`as_operator(layer, input_size)` is the linear map that torch's layer computes, and `rmatvec` its exact adjoint."""
    layer = attacks.convolution(rng, torch.float64, modes=("zeros", "circular", "reflect", "replicate"), extreme=0)
    size = attacks.size(rng, layer)
    truth, exponent = observers.finite_matrix(layer, size)
    op = sh.as_operator(layer, input_size=size)
    here = observers.array(op.to_dense()) / 2.0**exponent
    back = op.rmatvec(torch.eye(truth.shape[0], dtype=torch.float64).reshape(-1, *op.out_shape)).reshape(truth.shape)
    off = max(np.abs(here - truth).max(), np.abs(observers.array(back) / 2.0**exponent - truth).max())
    return Margin(off - 1e-12 * (1 + np.abs(truth).max()), f"{shown(layer)} size {size}")


def bounds_never_below(rng: Rng) -> Margin:
    """`sh.bounds.*` never lie below the norm, for every geometry, padding mode and input size, given or not."""
    dtype = attacks.dtype(rng)
    name = pick(rng, list(BOUNDS))
    if rng.random() < 0.2:
        layer, size = attacks.linear(rng, dtype), ()
    elif rng.random() < 0.2:
        layer, size = attacks.wide_circular(rng, dtype)
    else:
        layer = attacks.convolution(rng, dtype, modes=("zeros", "circular", "reflect", "replicate"))
        size = attacks.size(rng, layer)
    about = f"{name} of {shown(layer)}"
    if isinstance(layer, nn.Linear):
        truth, value = _norm(layer), float(BOUNDS[name](sh.as_operator(layer)))
    elif rng.random() < 0.3 and layer.in_channels * prod(size) <= 4000:
        sizes = size if all(n % s == 0 for n, s in zip(size, layer.stride, strict=True)) else attacks.divided(rng, layer)
        about += f" circular({sizes})"
        truth, value = observers.circular_norm(layer, sizes), float(BOUNDS[name](sh.as_operator(layer).circular(sizes)))
    elif layer.padding_mode == "zeros" and rng.random() < 0.5:
        truth, value = _norm(layer), float(BOUNDS[name](sh.as_operator(layer)))
    else:
        given = size if rng.random() < 0.5 else None
        about += f" at {size}, input_size={given}"
        if layer.in_channels * prod(size) > 1200:
            size = tuple(min(n, 2 * k + s) for n, k, s in zip(size, layer.kernel_size, layer.stride, strict=True))
            given = size if given else None
        truth, value = observers.finite_norm(layer, size), float(BOUNDS[name](sh.as_operator(layer, given)))
    return Margin(_over(truth, value), f"{about}: {value} for {truth}")


def absolute_sums_bound_their_norms(rng: Rng) -> Margin:
    """`absolute_sum(order=1 | inf)` is exact for matrices, and an upper bound of the 1- and ∞-norms of finite convolutions."""
    dtype, ord = attacks.dtype(rng), pick(rng, [1, inf])
    axis = 0 if ord == 1 else 1
    if rng.random() < 0.2:
        layer = attacks.linear(rng, dtype)
        matrix, exponent = observers.finite_matrix(layer, ())
        size: tuple[int, ...] | None = None
    else:
        layer = attacks.convolution(rng, dtype, modes=("zeros", "circular", "reflect", "replicate"))
        size = attacks.size(rng, layer)
        matrix, exponent = observers.finite_matrix(layer, size)
    truth = float(np.ldexp(np.abs(matrix).sum(axis).max(), exponent))
    about = f"ord={ord} of {shown(layer)} size {size}"
    value = float(sh.bounds.absolute_sum(sh.as_operator(layer, size), order=ord))
    excess = _over(truth, value)
    if isinstance(layer, nn.Linear) and _representable(truth, dtype):
        excess = max(excess, _over(value, truth))
    return Margin(excess, f"{about}: {value} for {truth}")


def lattice_norm_is_certified(rng: Rng) -> Margin:
    """`spectral_norm` of a convolution without an input size: `S <= value <= S (1 + rtol)`."""
    dtype, rtol = attacks.dtype(rng), float(10.0 ** rng.uniform(-6, -1))
    layer = attacks.convolution(rng, dtype, dims=None if rtol > 1e-4 else int(rng.integers(1, 3)))
    truth, about = _norm(layer), f"rtol={rtol:.2g} of {shown(layer)}"
    value = float(sh.spectral_norm(sh.as_operator(layer), rtol=max(rtol, 1e-6)))
    excess = _over(truth, value)
    if _representable(truth, dtype):
        excess = max(excess, _over(value, truth * (1 + rtol)))
    return Margin(excess, f"{about}: {value} for {truth}")


def exact_norms_are_exact(rng: Rng) -> Margin:
    """`spectral_norm` and `spectral_norms` of matrices and circular convolutions are exact up to rounding."""
    dtype = attacks.dtype(rng)
    if rng.random() < 0.3:
        layer = attacks.linear(rng, dtype, most=pick(rng, [8, 60]))
        op, truth, about = sh.as_operator(layer), _norm(layer), shown(layer)
    elif rng.random() < 0.6:
        layer, size = attacks.wide_circular(rng, dtype)
        op, truth, about = sh.as_operator(layer).circular(size), observers.circular_norm(layer, size), f"{shown(layer)} at {size}"
    else:
        layer = attacks.convolution(rng, dtype)
        size = attacks.divided(rng, layer)
        op, truth, about = sh.as_operator(layer).circular(size), observers.circular_norm(layer, size), f"{shown(layer)} at {size}"
    value = float(sh.spectral_norm(op))
    twice = [float(v) for v in sh.spectral_norms([op, op])]
    if not _representable(truth, dtype):
        return Margin(-1.0 if value >= truth * (1 - 0.6) or value == inf else inf, f"{about}: {value} for {truth}")
    return Margin(
        max(_over(v, truth) if v > truth else _over(truth, v) for v in (value, *twice)), f"{about}: {value}, {twice} for {truth}"
    )


def circular_pairs_do_not_fall_below(rng: Rng) -> Margin:
    """Norms and bounds of circular layers whose singular values cross are not below the norm, and clips obey their bound."""
    layer, n = attacks.circular_pairs(rng)
    truth, about = observers.circular_norm(layer, (n,)), f"{shown(layer)} at {n}"
    op = sh.as_operator(layer).circular(n)
    below = [_over(truth, float(norm(op))) for norm in (sh.spectral_norm, sh.bounds.cosine_grid, sh.bounds.gram_iteration)]
    stored = observers.circular_norm(observers.with_weight(layer, sh.projections.clip(op, 0.9 * truth, rounds=1)), (n,))
    return Margin(max(*below, _over(stored, 0.9 * truth)), f"{about}: norm {truth}, below by {below}, clipped to {stored}")


def finite_norm_is_near(rng: Rng) -> Margin:
    """`spectral_norm` of other finite convolutions: from below, to 1e-5."""
    dtype = attacks.dtype(rng)
    layer = attacks.convolution(rng, dtype, modes=("zeros", "circular", "reflect", "replicate"))
    size = attacks.size(rng, layer)
    truth, about = observers.finite_norm(layer, size), f"{shown(layer)} at {size}"
    value = float(sh.spectral_norm(sh.as_operator(layer, size)))
    if not _representable(truth, dtype):
        return Margin(-1.0 if isfinite(value) or truth > 1e38 else inf, about)
    return Margin(max(_over(value, truth), _over(truth * (1 - 1e-5), value)), f"{about}: {value} for {truth}")


def singular_values_are_exact(rng: Rng) -> Margin:
    """`singular_values`: all of them up to rounding of the largest; the `k` largest to 1e-6 of the largest."""
    dtype = attacks.dtype(rng)
    layer = _layer(rng, dtype, modes=("zeros", "circular", "reflect"))
    size = attacks.size(rng, layer)
    truth, about = observers.finite_singular_values(layer, size), f"{shown(layer)} at {size}"
    k = int(rng.integers(1, len(truth) + 1)) if rng.random() < 0.5 else None
    found = observers.array(sh.singular_values(sh.as_operator(layer, size or None), k=k))
    if not _representable(truth[0], dtype):
        return Margin(-1.0, about)
    off = np.abs(found - truth[:k]).max() / truth[0]
    # sums of up to a hundred products, and the solver's own, in float32
    return Margin(
        float(off) - (2e-6 if found.dtype == np.float64 and dtype != torch.float64 else 0.0), f"{about} k={k}: off by {off}"
    )


# -- projections -------------------------------------------------------------------------------------------------------------


def _projected(rng: Rng) -> tuple[Any, Any, Callable[[Any], float], float, str]:
    """A layer, its operator, what measures the norm of the same geometry with another weight, what that may lack, and a name."""
    dtype = attacks.dtype(rng)
    kind = pick(rng, ["lattice", "lattice", "lattice", "circular", "wide", "finite"])
    if kind == "wide":
        layer, size = attacks.wide_circular(rng, dtype)
        norm: Callable[[Any], float] = partial(observers.circular_norm, size=size)
        return layer, sh.as_operator(layer).circular(size), norm, 0.0, f"{shown(layer)} circular {size}"
    if kind == "lattice":
        layer = _layer(rng, dtype)
        return layer, sh.as_operator(layer), _norm, 0.0, shown(layer)
    layer = attacks.convolution(rng, dtype)
    if kind == "circular":
        size = attacks.divided(rng, layer)
        return (
            layer,
            sh.as_operator(layer).circular(size),
            partial(observers.circular_norm, size=size),
            0.0,
            f"{shown(layer)} circular {size}",
        )
    layer = attacks.convolution(rng, dtype, modes=("zeros", "circular", "reflect", "replicate"))
    size = attacks.size(rng, layer, largest=200)
    return layer, sh.as_operator(layer, size), partial(observers.finite_norm, size=size), 1e-5, f"{shown(layer)} at {size}"


def _stored_norm(layer: Any, weight: Tensor, norm: Callable[[Any], float]) -> float:
    """Of the values as they are stored."""
    if weight.dtype != layer.weight.dtype or weight.shape != layer.weight.shape:
        raise AssertionError(f"got {weight.dtype} {tuple(weight.shape)}")
    if not torch.isfinite(weight).all():
        return inf
    return norm(observers.with_weight(layer, weight))


def projections_obey_the_bound(rng: Rng) -> Margin:
    """The stored weight of `clip`, `rescale`, `band`, `polar` has norm at most `max_norm`; other finite convolutions to 1e-5."""
    layer, op, norm, lacks, about = _projected(rng)
    max_norm = attacks.level(rng, norm(layer))
    name = pick(rng, ["clip", "rescale", "band", "polar"], [0.5, 0.2, 0.2, 0.1])
    options = {"rounds": int(rng.integers(1, 6))} if name == "clip" else {}
    if name in ("band", "polar") and max_norm > torch.finfo(layer.weight.dtype).max / 1e3:
        name = "rescale"  # there are no weights with singular values that large
    if name == "band":
        options = {"min_norm": max_norm * pick(rng, [0.0, 1.0, float(rng.uniform())])}
    project = partial(getattr(sh.projections, name), **options)
    about = f"{name}({max_norm!r}, {options}) of {about}"
    result = _stored_norm(layer, project(op, max_norm), norm)
    return Margin(_over(result, max_norm * (1 + lacks)), f"{about}: {result}")


def inside_stays(rng: Rng) -> Margin:
    """`clip` and `rescale` return a weight that is inside already bit for bit.

    Matrices and circular layers with `norm <= max_norm`, others with `norm <= max_norm / (1 + r)`: `r = 1e-3` for few channels,
    and 1e-5 for finite ones.
    """
    layer, op, norm, lacks, about = _projected(rng)
    true = norm(layer)
    # what is only known to 1e-5 can only be known to be inside by that
    width = 0.0 if lacks or op.frequency_grid is not None else 1e-3
    share = (1 + 2 * lacks) * (1 + width) * pick(rng, [1 + _EXACT, 1 + 10.0 ** rng.uniform(-6, -2), float(rng.uniform(1, 3))])
    max_norm = float(max(true * share, 5e-324))
    project = pick(rng, [sh.projections.clip, sh.projections.rescale])
    about = f"{project.__name__}({max_norm!r}) of {about}, norm {true}"
    result = project(op, max_norm)
    moved = observers.array(result) - observers.array(layer.weight)
    return Margin(float(np.abs(moved).max()) / float(np.abs(observers.array(layer.weight)).max() or 1.0), about)


def groups_inside_stay(rng: Rng) -> Margin:
    """Of a grouped convolution `clip` and `rescale` leave groups with `norm <= max_norm / (1 + r)` as they are, bit for bit.

    The width `r` is that of the certificate of so few channels, 1e-3; nearer to the bound only what is proven stays.
    """
    dtype = attacks.dtype(rng)
    for _ in range(100):
        layer = attacks.convolution(rng, dtype)
        if layer.groups > 1:
            break
    norms = observers.group_norms(layer)
    max_norm = float(min(max(pick(rng, norms) * pick(rng, [1.001 + _EXACT, float(rng.uniform(1.001, 2))]), 5e-324), 1e300))
    project = pick(rng, [sh.projections.clip, sh.projections.rescale])
    about = f"{project.__name__}({max_norm!r}) of {shown(layer)}, norms {norms}"
    result = project(sh.as_operator(layer), max_norm)
    before, after = (np.split(observers.array(w), layer.groups) for w in (layer.weight, result))
    inside = [i for i, norm in enumerate(norms) if norm <= max_norm / (1 + 1e-3)]
    moved = max((np.abs(before[i] - after[i]).max() / (np.abs(before[i]).max() or 1.0) for i in inside), default=0.0)
    return Margin(float(moved), about)


def clip_is_no_farther_than_rescale(rng: Rng) -> Margin:
    """What `clip` returns is never farther from the original (Frobenius) than what `rescale` returns; of matrices by rounding."""
    layer, op, norm, _, about = _projected(rng)
    max_norm = attacks.level(rng, norm(layer))
    about = f"({max_norm!r}) of {about}"
    near, far = sh.projections.clip(op, max_norm), sh.projections.rescale(op, max_norm)
    weight, exponent = observers.unit_scaled(observers.array(layer.weight))
    eps = torch.finfo(dtype := layer.weight.dtype).eps
    is_fine_matrix = prod(op.canonical().shape[3:]) == 1 and dtype in (torch.float32, torch.float64)
    rounding = 5 * max(eps, 1e-10) * np.linalg.norm(np.ldexp(observers.array(near), -exponent)) if is_fine_matrix else 0.0
    near, far = (np.linalg.norm(np.ldexp(observers.array(w), -exponent) - weight) for w in (near, far))
    far += rounding
    return Margin(_over(near, far) if near > 1e-14 else -1.0, f"{about}: {near} against {far}, of {np.linalg.norm(weight)}")


def clip_of_a_matrix_is_nearest(rng: Rng) -> Margin:
    """`clip`, `band` and `polar` of a matrix: the nearest one, `U clamp(Σ, low, high) Vᵀ`, to the rounding of its dtype.

    In float64 to 1e-9 of the norm, and as far as float64 knows the singular vectors.
    """
    dtype = attacks.dtype(rng)
    layer = attacks.linear(rng, dtype, most=pick(rng, [6, 40]))
    max_norm = attacks.level(rng, _norm(layer))
    low = pick(rng, [0.0, max_norm, max_norm * float(rng.uniform())])
    about = f"[{low!r}, {max_norm!r}] of {shown(layer)}"
    info, weight = torch.finfo(dtype), observers.array(layer.weight)
    norm, least = observers.matrix_norm(weight), observers.singular_values(weight).min()
    unit = max(max_norm, min(norm, 1e3 * max_norm))
    if (low and least < 1e-4 * unit) or not info.tiny * 1e4 < max_norm < info.max / 1e4:
        return Margin(-1.0, f"{about}: directions or results that have no digits")
    op = sh.as_operator(layer)
    result = sh.projections.band(op, max_norm, min_norm=low) if low else sh.projections.clip(op, max_norm)
    off = observers.matrix_norm(observers.array(result) - observers.clipped_matrix(weight, low, max_norm)) / unit
    # what is stored is rounded, and so are the directions of a band's lower end
    digits = max(info.eps, 1e-9)
    room = digits * sqrt(min(weight.shape)) * (5 + (unit / least if low else 0.0))
    # singular vectors are known, by the reference too, as well as those of a matrix that differs by the rounding of its norm
    room += 1e-14 * (norm / unit) * min(max_norm / least if least else inf, 1.0)
    return Margin(float(off) - room, f"{about}: off by {off}")


# -- hooks -------------------------------------------------------------------------------------------------------------------


def _optimizer(rng: Rng, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    kind = pick(rng, ["sgd", "momentum", "adam", "adamw", "rmsprop", "adagrad"])
    if kind in ("sgd", "momentum"):
        return torch.optim.SGD(parameters, lr=rate, momentum=0.9 if kind == "momentum" else 0.0)
    other: Any = {
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }
    return other[kind](parameters, lr=rate)


def _model(rng: Rng, dtype: torch.dtype, unit: float) -> nn.Module:
    """A few layers of norms around a unit, some of them tied."""
    layers = [_layer(rng, dtype, extreme=0.0) for _ in range(int(rng.integers(1, 4)))]
    if rng.random() < 0.3:  # the same weight in a second geometry
        first = layers[0]
        second = copy.deepcopy(first)
        if not isinstance(second, nn.Linear):
            second.stride = tuple(int(rng.integers(1, 4)) for _ in second.stride)
            second.padding = tuple(0 for _ in second.stride) if isinstance(second.padding, str) else second.padding
            if second.transposed:
                second.output_padding = tuple(0 for _ in second.stride)
        second.weight = first.weight
        layers.append(second)
    for layer in {id(layer.weight): layer for layer in layers}.values():
        norm = _norm(layer)
        factor = unit / norm * 10.0 ** rng.uniform(-1, 1) if norm else 1.0
        layer.weight.data = attacks.stored(observers.array(layer.weight), factor, dtype)
    return nn.ModuleList(layers)


def _disturb(rng: Rng, model: Any, unit: float) -> str:
    """What a user does between steps: another weight, a checkpoint, another geometry; or nothing."""
    layer = pick(rng, list(model))
    kind = pick(rng, ["nothing"] * 8 + ["copy", "data", "parameter", "load", "geometry", "zero"])
    values = attacks.values(rng, tuple(layer.weight.shape), getattr(layer, "groups", 1))
    new = attacks.stored(values, unit * 10.0 ** rng.uniform(-2, 1), layer.weight.dtype)
    with torch.no_grad():
        if kind == "copy":
            layer.weight.copy_(new)
        elif kind == "data":
            layer.weight.data = new
        elif kind == "parameter" and sum(other.weight is layer.weight for other in model) == 1:
            layer.weight = nn.Parameter(new)
        elif kind == "load":
            model.load_state_dict({name: value * 10.0 ** rng.uniform(-1, 1) for name, value in model.state_dict().items()})
        elif kind == "zero":
            layer.weight.zero_()
        elif kind == "geometry" and not isinstance(layer, nn.Linear) and not layer.transposed and layer.padding != "same":
            layer.stride = tuple(int(rng.integers(1, 4)) for _ in layer.stride)
            layer.dilation = tuple(int(rng.integers(1, 3)) for _ in layer.stride)
    return kind


def hook_keeps_the_bound(rng: Rng) -> Margin:
    """`SpectralClip`: after `attach` and after every step each selected layer's norm, as it is stored, is at most `max_norm`."""
    dtype = attacks.dtype(rng)
    unit = 1.0 if rng.random() < 0.7 or dtype == torch.float16 else 10.0 ** rng.uniform(-30, 30)
    model = _model(rng, dtype, unit)
    rate = unit * 10.0 ** rng.uniform(-5, 0.5)
    options: dict[str, Any] = {"slack": pick(rng, [0.08, 0.08, 0.0, 0.3]), "rounds": int(rng.integers(1, 4))}
    if rng.random() < 0.2:
        options["projection"] = pick(rng, ["rescale", "band", "polar"])
    if rng.random() < 0.2:
        options["schedule"] = lambda step: unit * (1 + 0.3 * np.sin(step))
    hook = sh.SpectralClip(unit, **options)
    optimizer = _optimizer(rng, list(model.parameters()), rate)
    about = [f"SpectralClip({hook!r}) {type(optimizer).__name__} lr={rate:.3g} on {[shown(layer) for layer in model]}"]
    worst = Margin(-inf, about[0])

    def look(event: str) -> None:
        nonlocal worst
        about.append(event)
        for i, layer in enumerate(model):
            norm = _norm(layer) if torch.isfinite(layer.weight).all() else inf
            excess = _over(norm, hook.bound)
            if not excess <= worst.excess:
                worst = Margin(excess, f"{about[0]}; layer {i} after {', '.join(about[1:])}")

    handle = hook.attach(model, optimizer)
    look("attach")
    directions = [rng.normal(size=tuple(p.shape)) for p in model.parameters()]
    for _ in range(int(rng.integers(3, 10))):
        event = _disturb(rng, model, unit)
        optimizer.param_groups[0]["params"] = list(model.parameters())
        push = 100.0 if rng.random() < 0.1 else 1.0
        for parameter, direction in zip(model.parameters(), directions, strict=True):
            # steps that go on in one direction leave the ball; their length is that of the rate
            gradient = direction + rng.normal(size=direction.shape) * rng.uniform()
            parameter.grad = torch.from_numpy(push * gradient).to(dtype)
            # of another shape since a parameter was replaced
            for name, value in list(optimizer.state.get(parameter, {}).items()):
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    del optimizer.state[parameter][name]
        before = [bool(torch.isfinite(p).all()) for p in model.parameters()]
        try:
            optimizer.step()
        except ValueError as error:
            # a step that overflows is an error by contract
            if "NaN or infinity" in str(error) and not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
                break
            raise
        if not all(before):
            break
        look(f"{event}, a step{' of 100 times the length' if push > 1 else ''}")
    handle.remove()
    return worst


def batch_norm_gains_obey_the_bound(rng: Rng) -> Margin:
    """`SpectralClip(batch_norm="clip")`: the gains `|γ| / √(running_var + ε)`, as stored, are at most `max_norm`."""
    dtype, channels = attacks.dtype(rng), int(rng.integers(1, 40))
    layer = nn.BatchNorm1d(channels, eps=10.0 ** rng.uniform(-12, -1))
    layer.running_var.copy_(torch.from_numpy(10.0 ** rng.uniform(-8, 4, size=channels)))
    layer.weight.data = torch.from_numpy(rng.normal(size=channels) * 10.0 ** rng.uniform(-4, 4)).float()
    model = nn.Sequential(nn.Linear(channels, channels), layer).to(dtype)
    if not torch.isfinite(model[1].weight).all():
        return Margin(-1.0, "no such gains")
    bound = float(10.0 ** rng.uniform(-3, 3))
    about = f"batch norm {dtype} of {channels} bound {bound!r} eps {layer.eps!r}"
    sh.SpectralClip(bound, batch_norm="clip").attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
    gains = np.abs(observers.array(layer.weight)) / np.sqrt(observers.array(layer.running_var) + layer.eps)
    return Margin(_over(float(gains.max()), bound), f"{about}: {gains.max()}")


# -- parametrizations --------------------------------------------------------------------------------------------------------


def _set(rng: Rng, module: nn.Module) -> str:
    """Parameters of any scale from 1e-30 to 1e30, of any kind, that need not come from training."""
    power = pick(rng, [0.0, float(rng.uniform(-3, 3)), float(rng.uniform(-30, 30))])
    for parameter in module.parameters():
        shape = tuple(parameter.shape)
        if len(shape) < 2 or 0 in shape:
            continue
        values = attacks.values(rng, shape)
        parameter.data = attacks.stored(values, 10.0**power, parameter.dtype)
    return f"scale 1e{power:.2f}"


def _bounded_layer(rng: Rng) -> tuple[Any, Any, Callable[[Any], float], Any]:
    """A parametrizable layer, its plain copy, what measures it and its `input_size`."""
    dtype = attacks.dtype(rng)
    if rng.random() < 0.25:
        layer: Any = attacks.linear(rng, dtype, extreme=0)
        return layer, copy.deepcopy(layer), _norm, None
    layer = attacks.convolution(rng, dtype, modes=("zeros", "zeros", "zeros", "circular", "reflect", "replicate"), extreme=0)
    if layer.padding_mode == "zeros":
        return layer, copy.deepcopy(layer), _norm, None
    size = attacks.size(rng, layer, largest=200)
    given = None if layer.padding_mode == "circular" else size
    return layer, copy.deepcopy(layer), partial(observers.finite_norm, size=size), given


def _bounding(rng: Rng, name: str) -> Margin:
    layer, plain, norm, size = _bounded_layer(rng)
    max_norm = pick(rng, [1.0, float(10.0 ** rng.uniform(-3, 3)), float(10.0 ** rng.uniform(-30, 30))])
    about = f"{name}({max_norm!r}) of {shown(layer)} size {size}"
    layer = getattr(sh.parametrizations, name)(layer, max_norm, input_size=size)
    about += " " + _set(rng, layer)
    training = layer.weight
    with torch.no_grad():
        evaluated = layer.eval().weight
    excess = max(_over(_stored_norm(plain, w, norm), max_norm) for w in (training, evaluated))
    return Margin(excess, about)


def rescaled_obeys_the_bound(rng: Rng) -> Margin:
    """`rescaled`: the norm is at most `max_norm`, whatever the parameter becomes, for the stored dtype too."""
    return _bounding(rng, "rescaled")


def clipped_obeys_the_bound(rng: Rng) -> Margin:
    """`clipped`: the norm is at most `max_norm`, whatever the parameter becomes, for the stored dtype too."""
    return _bounding(rng, "clipped")


def banded_stays_in_the_band(rng: Rng) -> Margin:
    """`banded`: the singular values of the matrix lie in the band, up to the rounding of the stored dtype."""
    dtype = pick(rng, [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    layer = attacks.linear(rng, dtype, extreme=0)
    high = pick(rng, [1.0, float(10.0 ** rng.uniform(-2, 2))])
    low = high * pick(rng, [1.0, 0.0, float(rng.uniform())])
    # an end below the smallest normal number of the dtype is refused, with the remedy
    low = low if low >= torch.finfo(dtype).smallest_normal else 0.0
    about = f"banded({high!r}, min_norm={low!r}) of {shown(layer)}"
    layer = sh.parametrizations.banded(layer, high, min_norm=low)
    about += " " + _set(rng, layer)
    values = observers.singular_values(layer.weight)
    rounding = torch.finfo(dtype).eps * sqrt(min(layer.weight.shape))
    excess = max(_over(float(values.max()), high), float(low - values.min()) / high)
    return Margin(excess - rounding, f"{about}: {values.min()} … {values.max()}")


def _far_from_one(values: np.ndarray) -> float:
    return float(np.abs(values - 1).max())


def _gain(rng: Rng) -> float:
    return pick(rng, [1.0, float(10.0 ** rng.uniform(-20, 20))])


def orthogonal_matrices_are_orthogonal(rng: Rng) -> Margin:
    """`orthogonal` of a linear layer, all maps: all singular values are `max_norm` up to rounding, whatever the parameter is."""
    dtype, kind = pick(rng, [torch.float32, torch.float64]), pick(rng, ["cayley", "qr", "exp", "householder"])
    layer, gain = attacks.linear(rng, dtype, extreme=0), _gain(rng)
    about = f"orthogonal({gain!r}, orthogonal_map={kind!r}) of {shown(layer)}"
    layer = sh.parametrizations.orthogonal(layer, gain, orthogonal_map=kind)
    about += " " + _set(rng, layer)
    off = _far_from_one(observers.singular_values(layer.weight) / gain)
    return Margin(off - _orthogonal_rounding(dtype), f"{about}: off by {off}")


def _orthogonal_rounding(dtype: torch.dtype) -> float:
    """What "up to rounding" may be of a few products of matrices of two dozen rows."""
    return 200 * torch.finfo(dtype).eps


def orthogonal_kernels_are_orthogonal(rng: Rng) -> Margin:
    """`orthogonal` of a convolution: all singular values on the lattice are `max_norm` up to rounding, whatever is set."""
    dtype, kind = pick(rng, [torch.float32, torch.float64]), pick(rng, ["cayley", "qr", "exp", "householder"])
    layer, gain = attacks.convolution(rng, dtype, extreme=0, most=8), _gain(rng)
    plain, about = copy.deepcopy(layer), f"orthogonal({gain!r}, orthogonal_map={kind!r}) of {shown(layer)}"
    layer = sh.parametrizations.orthogonal(layer, gain, orthogonal_map=kind)
    about += " " + _set(rng, layer)
    plain.weight.data = layer.weight.detach()
    kernels, exponent = observers.by_groups(plain)
    frequencies = rng.uniform(0, 2 * np.pi, size=(12, len(plain.stride)))
    off = 0.0
    for kernel in kernels:
        matrices = observers.alias_matrices(np.ldexp(kernel, exponent), frequencies, plain.stride, plain.dilation)
        values = np.linalg.svd(matrices, compute_uv=False)
        # inputs that a stride beyond the kernel never reads, and aliases that a dilation makes equal, are no directions
        channels = plain.in_channels // plain.groups if not plain.transposed else plain.out_channels // plain.groups
        read = prod(_read(s, d, k) for s, d, k in zip(plain.stride, plain.dilation, plain.kernel_size, strict=True))
        rank = min(kernel.shape[0], channels * read)
        off = max(off, _far_from_one(values[:, :rank] / gain))
    return Margin(off - _orthogonal_rounding(dtype) * sum(plain.kernel_size), f"{about}: off by {off}")


def _read(stride: int, dilation: int, taps: int) -> int:
    """How many samples of a stride's the taps of a kernel meet."""
    return len({(dilation * t) % stride for t in range(taps)})


def _replaceable(rng: Rng) -> tuple[Any, tuple[int, ...]]:
    """A convolution that keeps the size or divides it by its stride, and an input size."""
    dims = pick(rng, [1, 2, 2, 3])
    kernel = tuple(pick(rng, [1, 3, 5] if dims == 1 else [1, 3]) for _ in range(dims))
    stride = pick(rng, [1, 1, 2])
    dilation = pick(rng, [1, 1, 2]) if stride == 1 else 1
    groups = pick(rng, [1, 1, 2])
    channels = [groups * int(rng.integers(1, 5)) for _ in range(2)]
    mode, dtype = pick(rng, ["zeros", "circular"]), pick(rng, [torch.float32, torch.float64])
    padding = tuple(dilation * (k // 2) for k in kernel)
    kind: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "padding_mode": mode}
    layer = kind(*channels, kernel, bias=False, dtype=dtype, **options)
    most = {1: 12, 2: 6, 3: 3}[dims]
    size = tuple(stride * int(rng.integers(max(2, max(padding)), max(3, most // stride + max(padding)))) for _ in range(dims))
    return layer, size


def _module_is_orthogonal(
    layer: Any, size: tuple[int, ...], make: Callable[[Any, float], nn.Module], rng: Rng, width: float
) -> Margin:
    dtype, about = layer.weight.dtype, f"{shown(layer)} at {size}"
    channels, ends = layer.in_channels, prod(layer.stride) * layer.in_channels
    gain = _gain(rng)
    module = make(layer, gain)
    about += f" gain {gain} {module!r}".replace("\n", " ")[:80] + " " + _set(rng, module)
    values = observers.singular_values(observers.applied_to_identity(module, (channels, *size), dtype))
    # fewer outputs than inputs: the others are lost
    lost = prod(size) * channels - prod(size) // prod(layer.stride) * min(layer.out_channels, ends)
    values = values[: len(values) if lost <= 0 else prod(size) * channels - lost]
    off = _far_from_one(values / gain)
    return Margin(off - width - _orthogonal_rounding(dtype), f"{about}: off by {off}")


def skew_is_orthogonal(rng: Rng) -> Margin:
    """`skew`: all singular values lie in `1 ± 3e-6`, up to rounding, for every weight, gain and input size."""
    layer, size = _replaceable(rng)
    degree = int(rng.integers(2, 9))
    return _module_is_orthogonal(layer, size, partial(sh.parametrizations.skew, degree=degree), rng, 3e-6)


def cayley_is_orthogonal(rng: Rng) -> Margin:
    """`cayley`: orthogonal up to rounding with periodic boundary, for every weight and at every input size."""
    return _module_is_orthogonal(*_replaceable(rng), sh.parametrizations.cayley, rng, 0.0)


def group_shuffle_is_orthogonal(rng: Rng) -> Margin:
    """`group_shuffle` of a convolution: all singular values lie in `[1 - 3e-6, 1]`, up to rounding, for every weight and size."""
    layer, size = _replaceable(rng)
    ends = max(layer.out_channels, layer.in_channels * (prod(layer.stride) if max(layer.kernel_size) > 1 else 1)) // layer.groups
    for blocks in (2, 1):
        try:
            sh.parametrizations.group_shuffle(copy.deepcopy(layer), blocks=blocks)
        except ValueError:
            if blocks == 1:
                return Margin(-1.0, f"no blocks for {ends}")
        else:
            break
    return _module_is_orthogonal(layer, size, partial(sh.parametrizations.group_shuffle, blocks=blocks), rng, 3e-6)


def rotation_keeps_the_spectrum(rng: Rng) -> Margin:
    """`group_shuffle(fine_tune=True)`: no singular value of a matrix changes, whatever the parameters become."""
    dtype, k = pick(rng, [torch.float32, torch.float64]), pick(rng, [1, 2, 3])
    shape = (k * int(rng.integers(2, 6)), k * int(rng.integers(2, 6)))
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    layer.weight.data = attacks.stored(attacks.values(rng, shape), 1.0, dtype)
    before = observers.singular_values(layer.weight)
    about = f"rotated {shown(layer)} blocks {k}"
    layer = sh.parametrizations.group_shuffle(layer, blocks=k, fine_tune=True, two_sided=rng.random() < 0.5)
    power = float(rng.uniform(-30, 30))
    for parameter in layer.parameters():
        if parameter.requires_grad:
            parameter.data = attacks.stored(attacks.values(rng, tuple(parameter.shape)), 10.0**power, dtype)
    after = observers.singular_values(layer.weight)
    off = float(np.abs(after - before).max() / (before[0] or 1.0))
    return Margin(off - _orthogonal_rounding(dtype), f"{about} scale 1e{power:.2f}: off by {off}")


def tensor_train_has_the_norm_of_its_core(rng: Rng) -> Margin:
    """`tensor_train`: the norm of the layer is that of its core, whatever the parameters become."""
    dtype = pick(rng, [torch.float32, torch.float64])
    layer = _layer(rng, dtype, extreme=0.0)
    plain, about = copy.deepcopy(layer), f"tensor_train of {shown(layer)}"
    outputs, inputs = (layer.weight.shape[0] // getattr(layer, "groups", 1), layer.weight.shape[1])
    rank = int(rng.integers(1, min(outputs, inputs) + 1))
    thin = sh.parametrizations.tensor_train(layer, rank)
    about += " " + _set(rng, thin)
    core = float(sh.spectral_norm(sh.as_operator(thin), rtol=1e-5))
    plain.weight.data = thin.to_plain().weight.detach()
    if not _representable(core, dtype):
        return Margin(-1.0, about)
    whole = _norm(plain)
    off = max(_over(whole, core), _over(core, whole * (1 + 1e-5)))
    return Margin(off - _orthogonal_rounding(dtype), f"{about}: {whole} against {core}")


def conv_norm_has_gain_one(rng: Rng) -> Margin:
    """`conv_norm` with circular padding: every output channel is a map with `A_o A_oᵀ = I`; no weight has a channel above one."""
    layer, size = _replaceable(rng)
    layer.padding_mode = "circular"
    layer._reversed_padding_repeated_twice = [p for p in reversed(layer.padding) for _ in range(2)]
    if any(n < d * (k - 1) + 1 for n, d, k in zip(size, layer.dilation, layer.kernel_size, strict=True)):
        return Margin(-1.0, "too small")
    dtype, channels, outputs, about = layer.weight.dtype, layer.in_channels, layer.out_channels, f"{shown(layer)} at {size}"
    module = sh.parametrizations.conv_norm(layer)
    about += " " + _set(rng, module)
    matrix = observers.applied_to_identity(module, (channels, *size), dtype)
    rows = matrix.reshape(outputs, -1, matrix.shape[1])
    largest = max(observers.matrix_norm(row) for row in rows)
    return Margin(_over(largest, 1 + 10 * _orthogonal_rounding(dtype)), f"{about}: {largest}")


#: Every promise.
PROMISES: tuple[Promise, ...] = (
    operator_is_the_layer,
    bounds_never_below,
    absolute_sums_bound_their_norms,
    lattice_norm_is_certified,
    exact_norms_are_exact,
    circular_pairs_do_not_fall_below,
    finite_norm_is_near,
    singular_values_are_exact,
    projections_obey_the_bound,
    inside_stays,
    groups_inside_stay,
    clip_is_no_farther_than_rescale,
    clip_of_a_matrix_is_nearest,
    hook_keeps_the_bound,
    batch_norm_gains_obey_the_bound,
    rescaled_obeys_the_bound,
    clipped_obeys_the_bound,
    banded_stays_in_the_band,
    orthogonal_matrices_are_orthogonal,
    orthogonal_kernels_are_orthogonal,
    skew_is_orthogonal,
    cayley_is_orthogonal,
    group_shuffle_is_orthogonal,
    rotation_keeps_the_spectrum,
    tensor_train_has_the_norm_of_its_core,
    conv_norm_has_gain_one,
)
