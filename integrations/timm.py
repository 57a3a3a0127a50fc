"""timm: `model = apply_spectral(timm.create_model(...))` keeps every layer's norm in any training script."""

from __future__ import annotations

import copy
import inspect
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from spectral_hooks import hooks, parametrizations, projections
from spectral_hooks.parametrizations.remove import remove_spectral as remove_spectral
from spectral_hooks.parametrizations.remove import spectral_report as spectral_report
from spectral_hooks.weights.patterns import Patterns
from spectral_hooks.weights.selection import select
from spectral_hooks.weights.targets import Target

Model = TypeVar("Model", bound=nn.Module)

_logger = logging.getLogger("spectral_hooks")


def apply_spectral(
    model: Model,
    constraint: str | Callable[..., Any] = parametrizations.rescaled,
    *,
    layers: Patterns = None,
    exclude: Patterns = None,
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
        constraint: a parametrization `layer → layer`; or a projection `(op, max_norm) → weight` (known by a first parameter
            called `op`), which is applied to the weights now; or the name of one in `sh.parametrizations`, `sh.projections`.
        layers, exclude: which layers, as for `sh.SpectralClip`.
        input_size: size of the images, `n`, `(h, w)` or `(c, h, w)`, for parametrizations of layers with reflect or replicate
            padding: their norm depends on it. Default: that of a fixed-size model's patch embedding, if any.
        optimizer: with a projection only: project after each step too, as `sh.SpectralClip(...).attach(model, optimizer)`.
        **options: for the constraint: `max_norm=1.0`, `bound=`, `rounds=` and so on.

    Returns:
        The model. What is left out is logged with the reason, as a warning for linear and convolutional layers.

    Raises:
        ValueError, TypeError: an argument is wrong, a pattern matches nothing, no layer is left; with the layer's name what the
            constraint complains of. What it does not support (NotImplementedError) is left out.

    Example:
        >>> import timm
        >>> from spectral_hooks.integrations.timm import apply_spectral, remove_spectral
        >>> model = apply_spectral(timm.create_model("resnet10t", num_classes=10), max_norm=1.0, exclude="fc")
        >>> plain = remove_spectral(model)  # the trained weights in plain layers, under plain names
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module; got {type(model).__name__}.")
    constrain = _function(constraint)
    if _parameters(constrain)[0] == "op":
        clip = hooks.SpectralClip(layers=layers, exclude=exclude, projection=constrain, **options)
        clip.start(model) if optimizer is None else clip.attach(model, optimizer)
        _log(model, clip.skipped)
        return model
    if optimizer is not None:
        raise TypeError("`optimizer` is for projections: a parametrization holds after every step of any optimizer.")
    selection = select(model, layers, exclude)
    unsized = {name: layer for name, layer in model.named_modules() if "`input_size" in selection.skipped.get(name, "")}
    sizes = input_sizes(model, input_size) if unsized and "input_size" in _parameters(constrain) else {}
    jobs: list[tuple[str, nn.Module, dict[str, Any]]] = []
    for target in selection.targets:
        if isinstance(target, Target):
            jobs += [(target.name, layer, {}) for layer in target.layers]
        else:
            selection.skipped[target.name] = "has adapters, whose sum with the weight only a projection constrains; or merge them"
    jobs += [(name, layer, {"input_size": sizes[layer]}) for name, layer in unsized.items() if layer in sizes]
    made: dict[nn.Module, nn.Module] = {}
    for name, layer, sized in jobs:
        try:
            made[layer] = constrain(layer, **sized, **options)
            selection.skipped.pop(name, None)
        except NotImplementedError as error:
            selection.skipped[name] = str(error)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
    for module in list(model.modules()):
        module._modules.update({key: made[child] for key, child in module._modules.items() if child in made})
    _log(model, selection.skipped)
    return made.get(model, model)  # type: ignore[return-value]


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


def _function(constraint: str | Callable[..., Any]) -> Callable[..., Any]:
    made = {name: f for name, f in inspect.getmembers(parametrizations, inspect.isfunction) if _parameters(f)[0] == "layer"}
    if constraint in made:
        return made[str(constraint)]
    try:
        return projections.named(constraint)
    except ValueError as error:
        known = ", ".join(made)
        raise ValueError(f"`constraint` must be a function layer -> layer, one of {known}, or a projection: {error}") from None


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _log(model: nn.Module, skipped: dict[str, str]) -> None:
    """What was left out, a line for each reason; that of linear and convolutional layers without the user's wish is a warning."""
    modules, lines = dict(model.named_modules()), defaultdict(list)
    for name, reason in skipped.items():
        of_weights = isinstance(modules.get(name), (nn.Linear, nn.modules.conv._ConvNd))
        wished = reason.startswith(("excluded", "not among", "shares"))
        lines[logging.WARNING if of_weights and not wished else logging.INFO, reason].append(name or "the model itself")
    for (level, reason), names in lines.items():
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        _logger.log(level, "apply_spectral leaves out %s: %s", shown, reason)
