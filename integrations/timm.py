"""timm: `model = apply_spectral(timm.create_model(...))` keeps every layer's norm in any training script."""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import nn

from spectral_hooks import hooks, parametrizations, projections
from spectral_hooks.operators.layers import is_adapter
from spectral_hooks.parametrizations.remove import remove_spectral as remove_spectral
from spectral_hooks.parametrizations.remove import spectral_report as spectral_report
from spectral_hooks.projections import Projection
from spectral_hooks.weights.patterns import Patterns
from spectral_hooks.weights.selection import Selection, select

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger("spectral_hooks")

#: Of the room of parametrizations, what makes no layer of a layer.
_NO_CONSTRAINTS = (remove_spectral.__name__, spectral_report.__name__)


def apply_spectral(
    model: Model,
    constraint: str | Callable[..., Any] = "rescaled",
    *,
    layers: Patterns = None,
    exclude: Patterns = None,
    projection: str | Projection | None = None,
    input_size: int | Sequence[int] | None = None,
    optimizer: Any = None,
    **options: Any,
) -> Model:
    """Constrain every linear and convolutional layer of a model; by default to operator norm at most 1, by construction.

    The order: create, load a checkpoint, `apply_spectral`; then EMA, `torch.compile`, DDP, and last the optimizer. Whatever
    replaces layers afterwards (`reset_classifier`, `reparameterize_model`) makes plain ones: see `spectral_report(model)`, and
    apply it again.

    Args:
        model: any module, changed in place.
        constraint: the name of a function in `sh.parametrizations` or `sh.projections`, or one of these itself (also a `partial`
            of it). A projection is applied to the weights now. Every other function is a parametrization `layer → layer`.
        layers, exclude: which layers, as for `sh.SpectralClip`.
        projection: a projection of your own, `(operator, max_norm) → weight`, in the place of `constraint`.
        input_size: size of the images, `n`, `(h, w)` or `(c, h, w)`, for parametrizations of layers with reflect or replicate
            padding: their norm depends on it. Default: that of a fixed-size model's patch embedding, if any.
        optimizer: with a projection only: project after each step too, as `sh.SpectralClip(...).attach(model, optimizer)`.
        **options: for the constraint: `max_norm=1.0`, `bound=` and so on; for a projection those of `sh.SpectralClip`.

    Returns:
        The model. What is left out is logged with the reason, as a warning for linear and convolutional layers.

    Raises:
        ValueError, TypeError: an argument is wrong, a pattern matches nothing, no layer is left; with the layer's name what the
            constraint complains of, or that it returns no layer. What it does not support (NotImplementedError) is left out.

    Example:
        >>> import timm
        >>> from spectral_hooks.integrations.timm import apply_spectral, remove_spectral
        >>> model = apply_spectral(timm.create_model("resnet10t", num_classes=10), max_norm=1.0, exclude="fc")
        >>> plain = remove_spectral(model)  # the trained weights in plain layers, under plain names
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module; got {type(model).__name__}.")
    if projection is not None and constraint != "rescaled":
        raise TypeError(f"`projection` stands in the place of `constraint`: give one of them; got {constraint!r} too.")
    projection = _projection(constraint) if projection is None else projection
    if projection is not None:
        clip = hooks.SpectralClip(layers=layers, exclude=exclude, projection=projection, **options)
        clip.start(model) if optimizer is None else clip.attach(model, optimizer)
        _log(model, clip.skipped)
        return model
    if optimizer is not None:
        raise TypeError("`optimizer` is for projections: a parametrization holds after every step of any optimizer.")
    constrain, selection = _parametrization(constraint), select(model, layers, exclude)
    made = _constrained(constrain, selection, _sizes(model, selection, constrain, input_size), options)
    for module in list(model.modules()):
        module._modules.update({key: made[child] for key, child in module._modules.items() if child in made})
    _log(model, selection.skipped)
    return made.get(model, model)  # type: ignore[return-value]


def _constrained(
    constrain: Callable[..., Any], selection: Selection, sizes: dict[str, tuple[nn.Module, Any]], options: dict[str, Any]
) -> dict[nn.Module, nn.Module]:
    """What the constraint makes of each layer; what it does not support is added to the selection's `skipped`."""
    jobs: list[tuple[str, nn.Module, dict[str, Any]]]
    jobs = [(target.name, layer, {}) for target in selection.targets for layer in target.layers]
    jobs += [(name, layer, {"input_size": size}) for name, (layer, size) in sizes.items()]
    made: dict[nn.Module, nn.Module] = {}
    for name, layer, sized in jobs:
        try:
            if is_adapter(layer):
                raise NotImplementedError("has adapters, whose sum with the weight only a projection constrains; or merge them")
            made[layer] = constrain(layer, **sized, **options)
            if not isinstance(made[layer], nn.Module):
                raise TypeError(f"returned a {type(made[layer]).__name__}, and no layer")
            selection.skipped.pop(name, None)
        except NotImplementedError as error:
            selection.skipped[name] = str(error)
        except (AttributeError, TypeError, ValueError) as error:
            own = getattr(parametrizations, getattr(constrain, "__name__", ""), None) is not constrain
            hint = " (`constraint` is called with a layer and returns one; a projection of your own goes to `projection=`)"
            kind = ValueError if isinstance(error, ValueError) else TypeError
            raise kind(f"{name}: {error}{hint if own and kind is TypeError else ''}") from error
    return made


def _sizes(
    model: nn.Module, selection: Selection, constrain: Callable[..., Any], input_size: int | Sequence[int] | None
) -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """The layers that were left out for want of an input size, by name, with that size where it is known."""
    layers = {name: layer for name, layer in model.named_modules() if "`input_size" in selection.skipped.get(name, "")}
    sizes = input_sizes(model, input_size) if layers and "input_size" in signature(constrain).parameters else {}
    return {name: (layer, sizes[layer]) for name, layer in layers.items() if layer in sizes}


def input_sizes(model: nn.Module, input_size: int | Sequence[int] | None = None) -> dict[nn.Module, tuple[int, ...]]:
    """The spatial input size of each convolution, by a forward of a copy on the meta device; empty if no size is known."""
    # `pretrained_cfg["input_size"]` knows nothing of `in_chans=` and `img_size=`
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) if input_size is None else input_size
    first = next((layer for layer in model.modules() if isinstance(layer, nn.modules.conv._ConvNd)), None)
    if size is None or first is None:
        return {}
    shape = (size, size) if isinstance(size, int) else tuple(size)
    if not 2 <= len(shape) <= 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(f"`input_size` must be n, (h, w) or (c, h, w), in pixels; got {input_size!r}.")
    shape = (first.in_channels, *shape)[-3:]
    twin = copy.deepcopy(model).to("meta").eval()
    original = dict(zip(twin.modules(), model.modules(), strict=True))
    seen: dict[nn.Module, tuple[int, ...]] = {}

    def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen[original[layer]] = tuple(inputs[0].shape[2:])

    for layer in twin.modules():
        if isinstance(layer, nn.modules.conv._ConvNd):
            layer.register_forward_pre_hook(record)
    with torch.no_grad():
        twin(torch.empty(1, *shape, device="meta"))
    return seen


def _projection(constraint: str | Callable[..., Any]) -> Projection | None:
    """The projection that is meant, or None: one of the list, by its name, itself or in a `partial`."""
    if isinstance(constraint, str):
        return projections.named(constraint) if constraint in projections.__all__ else None
    plain = constraint
    while isinstance(plain, partial):
        plain = plain.func
    return constraint if any(plain is projections.named(name) for name in projections.__all__) else None


def _parametrization(constraint: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function `layer → layer` of this name, or the given one."""
    known = [name for name in parametrizations.__all__ if name not in _NO_CONSTRAINTS]
    if not (callable(constraint) or constraint in known):
        raise ValueError(
            f"`constraint` must be a function layer -> layer, one of {', '.join(known)}, or of the projections "
            f"{', '.join(projections.__all__)}; got {constraint!r}."
        )
    return getattr(parametrizations, constraint) if isinstance(constraint, str) else constraint


def _log(model: nn.Module, skipped: dict[str, str]) -> None:
    """What was left out, a line for each reason; that of linear and convolutional layers without the user's wish is a warning."""
    modules, lines = dict(model.named_modules()), defaultdict(list)
    for name, reason in skipped.items():
        layer = modules.get(name, nn.Identity())
        of_weights = isinstance(layer, (nn.Linear, nn.modules.conv._ConvNd)) or is_adapter(layer)
        wished = reason.startswith(("excluded", "not among", "shares"))
        lines[logging.WARNING if of_weights and not wished else logging.INFO, reason].append(name or "the model itself")
    for (level, reason), names in lines.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        _logger.log(level, "apply_spectral leaves out %s: %s", shown, reason)
