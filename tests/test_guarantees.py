"""A short attack on every promise, with fixed seeds; `make fuzz` goes on from there."""

from __future__ import annotations

import pytest
from promises import PROMISES, Promise, attack, is_broken

#: Attacks of every promise; fewer of those that take long, more where few inputs are dangerous.
_SEEDS = 12
_OTHERWISE = {
    "circular_pairs_do_not_fall_below": 30,
    "hook_keeps_the_bound": 6,
    "clip_is_no_farther_than_rescale": 8,
    "lattice_norm_is_certified": 8,
    "clipped_obeys_the_bound": 8,
    "orthogonal_kernels_are_orthogonal": 6,
    "tensor_train_has_the_norm_of_its_core": 6,
}


@pytest.mark.parametrize(
    ("promise", "seed"),
    [pytest.param(p, seed, id=f"{p.__name__}-{seed}") for p in PROMISES for seed in range(_OTHERWISE.get(p.__name__, _SEEDS))],
)
def test_the_promise_is_kept(promise: Promise, seed: int) -> None:
    margin = attack(promise, seed)
    assert not is_broken(margin), f"{promise.__name__} --seed {seed}: broken by {margin.excess:.3g}; {margin.about}"


def test_every_promise_is_stated() -> None:
    assert all(promise.__doc__ for promise in PROMISES)
    assert len({promise.__name__ for promise in PROMISES}) == len(PROMISES)
