"""Handwritten digits with Keras on torch: a small convolutional network as it is, and with SpectralClip(1.0) on every layer.

    KERAS_BACKEND=torch python examples/keras_digits.py

Needs `pip install "spectral_hooks[keras]" scikit-learn`. The data comes with scikit-learn; nothing is downloaded.
Prints one table. Within a minute on one idle core.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import spectral_hooks as sh
from spectral_hooks.integrations.keras import Kernel, SpectralClip, SpectralClipCallback, mirror

import keras  # isort: skip

parser = argparse.ArgumentParser(description="Handwritten digits without and with SpectralClip, in Keras.")
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--quick", action="store_true", help="a tenth of the data: not for figures")
args = parser.parse_args()

MAX_NORM, SCALE, RADII = 1.0, 20.0, (0.05, 0.1)
torch.set_num_threads(1)  # for 8×8 images a second thread costs more than it brings

# -- data: 1797 images of 8×8 pixels in [0, 1] ---------------------------------------------------------------------------

digits = load_digits()
images, labels = digits.images[..., None].astype("float32") / 16, digits.target
x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=400, stratify=labels, random_state=0)
if args.quick:
    x_train, y_train = x_train[::10], y_train[::10]

# -- the network: strided, depthwise and separable convolutions ----------------------------------------------------------


def network(clip: Any) -> keras.Model:
    """`clip` makes the constraint of a layer from its geometry, or None."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", activation="relu", kernel_constraint=clip()),
            layers.Conv2D(32, 3, strides=2, padding="same", activation="relu", kernel_constraint=clip(strides=2)),
            layers.DepthwiseConv2D(3, padding="same", activation="relu", depthwise_constraint=clip(kind="depthwise")),
            layers.SeparableConv2D(
                32, 3, padding="same", activation="relu",
                depthwise_constraint=clip(kind="depthwise"), pointwise_constraint=clip(),
            ),
            layers.Flatten(),
            layers.Dense(10, kernel_constraint=clip()),
            # the logits of layers of norm 1 lie close together
            layers.Rescaling(SCALE),
        ]
    )  # fmt: skip


@torch.no_grad()
def norms(model: keras.Model) -> list[float]:
    """The operator norm of each kernel, certified for every input size."""
    kernels = [kernel for kernel in mirror(model).modules() if isinstance(kernel, Kernel)]
    return [float(sh.spectral_norm(sh.as_operator(kernel))) for kernel in kernels]


def accuracies(model: keras.Model) -> list[float]:
    """On the test images, and proven for everything that lies within each radius of them.

    The network is a chain of its kernels and of ReLUs, so its Lipschitz constant is at most the product of their norms, and an
    answer cannot change within `margin / (√2 · constant)` (Tsuzuku, Sato and Sugiyama 2018).
    """
    logits = model.predict(x_test, verbose=0)
    right = np.take_along_axis(logits, y_test[:, None], axis=1)[:, 0]
    np.put_along_axis(logits, y_test[:, None], -np.inf, axis=1)
    radius = (right - logits.max(axis=1)) / (np.sqrt(2) * SCALE * np.prod(norms(model)))
    return [float((radius > least).mean()) for least in (0.0, *RADII)]


# -- train twice: same seed, same everything, but for the constraints ----------------------------------------------------

loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
rows = []
for name in ("plain", f"SpectralClip({MAX_NORM})"):
    print(name, flush=True)
    keras.utils.set_random_seed(0)
    constrained = name != "plain"
    model = network(lambda constrained=constrained, **geometry: SpectralClip(MAX_NORM, **geometry) if constrained else None)
    model.compile(keras.optimizers.Adam(0.003), loss)
    start = max(norms(model))
    # the callback projects the first weights too, which Keras does not apply constraints to
    callbacks = [SpectralClipCallback(MAX_NORM)] if constrained else []
    began = time.perf_counter()
    model.fit(x_train, y_train, batch_size=128, epochs=args.epochs, verbose=0, callbacks=callbacks)
    seconds = (time.perf_counter() - began) / args.epochs
    rows.append((name, accuracies(model), start, max(norms(model)), seconds))

# -- one table -----------------------------------------------------------------------------------------------------------

print(f"""
                         test   largest operator norm   accuracy proven within     seconds
                     accuracy     at start     at end     ε = {RADII[0]}     ε = {RADII[1]}   per epoch""")
for name, (clean, near, far), start, end, seconds in rows:
    print(f"{name:<18}{clean:>11.1%}{start:>13.3f}{end:>11.3f}{near:>13.1%}{far:>12.1%}{seconds:>12.2f}")
