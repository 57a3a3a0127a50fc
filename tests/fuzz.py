"""Attack every promise of the library for as long as one likes: `python tests/fuzz.py --minutes 10`, or `make fuzz MINUTES=60`.

Prints the counts and the worst margin of every promise, with the seed that makes it again:
`python tests/fuzz.py --promise NAME --seed N`. An interrupt ends it early,
with the same table. The exit code is 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import queue
import signal
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import count
from math import inf
from typing import Any, NamedTuple

import torch
from promises import PROMISES, TOLERANCE, Margin, Promise, attack, is_broken

#: Broken attempts that are told in full, of every promise.
_TOLD = 5
#: Seconds that an attack may go on after the time is over.
_GRACE = 60


class Attempt(NamedTuple):
    """One attack: which promise, which seed, how it went, and how long it took."""

    promise: str
    seed: int
    margin: Margin
    seconds: float


def attempt(promise: Promise, seed: int) -> Attempt:
    start = time.perf_counter()
    return Attempt(promise.__name__, seed, attack(promise, seed), time.perf_counter() - start)


def silence() -> None:
    """What the library says of the layers that it is given is no news here: only errors are, and they become margins."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")


def _work(first: int, processes: int, names: list[str], until: float, results: Any) -> None:
    """One process: every so many seeds, all promises in turn, until the time is over. Says what it begins, as (name, seed)."""
    # an interrupt goes to all processes of a terminal; the first one ends the others
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    silence()
    for seed in count(first, processes):
        for promise in PROMISES:
            if time.time() > until:
                results.put((first, None))
                return
            if promise.__name__ in names:
                results.put((first, (promise.__name__, seed)))
                results.put((first, attempt(promise, seed)))


def attempts(names: list[str], minutes: float, start: int, processes: int) -> Iterator[Attempt]:
    """Attempts of several processes as they come, until the time is over or an interrupt; then says what was left unfinished."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    until = time.time() + 60 * minutes
    firsts = range(start, start + processes)
    workers = [context.Process(target=_work, args=(i, processes, names, until, results), daemon=True) for i in firsts]
    running: dict[int, tuple[str, int] | None] = dict.fromkeys(firsts)
    try:
        for worker in workers:
            worker.start()
        while running:
            who, found = results.get(timeout=max(until + _GRACE - time.time(), 0.01))
            if isinstance(found, Attempt):
                running[who] = None
                yield found
            elif found is None:
                del running[who]
            else:
                running[who] = found
    except (KeyboardInterrupt, queue.Empty):
        pass
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()
    for name, seed in filter(None, running.values()):
        print(f"UNFINISHED {name} --seed {seed}", flush=True)


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def with_progress(found: Iterable[Attempt]) -> Iterator[Attempt]:
    """Show how many have been made and how many promises were broken."""
    broken = 0
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    bar = tqdm(found, unit=" attacks", mininterval=2) if tqdm else found
    last = time.monotonic()
    for made, each in enumerate(bar, start=1):
        broken += is_broken(each.margin)
        if tqdm:
            bar.set_postfix(broken=broken, refresh=False)
        elif time.monotonic() - last > 30:
            last = time.monotonic()
            print(f"{made} attacks, {broken} broken", file=sys.stderr, flush=True)
        yield each


def _until_interrupted(found: Iterable[Attempt]) -> Iterator[Attempt]:
    """Those that came before an interrupt, wherever it strikes."""
    try:
        yield from found
    except KeyboardInterrupt:
        return


def report(found: Iterable[Attempt]) -> int:
    """Print a row for every promise, worst margins and slowest seeds; how many attacks broke a promise."""
    rows: dict[str, list[Attempt]] = {}
    counts: dict[str, list[int]] = {}
    for each in _until_interrupted(found):
        worst, slowest = rows.setdefault(each.promise, [each, each])
        numbers = counts.setdefault(each.promise, [0, 0])
        numbers[0] += 1
        if not each.margin.excess <= worst.margin.excess:
            rows[each.promise][0] = each
        if each.seconds > slowest.seconds:
            rows[each.promise][1] = each
        if is_broken(each.margin):
            numbers[1] += 1
            if numbers[1] <= _TOLD:
                print(f"BROKEN {each.promise} --seed {each.seed}: {each.margin.excess:.3g}; {each.margin.about}", flush=True)
    print(f"\n{'promise':<40}{'attacks':>9}{'broken':>8}{'worst margin':>15}{'seed':>8}{'slowest':>10}{'seed':>8}")
    for name, (worst, slowest) in rows.items():
        made, broken = counts[name]
        excess = "error" if worst.margin.excess == inf else f"{worst.margin.excess:+.2e}"
        print(f"{name:<40}{made:>9}{broken:>8}{excess:>15}{worst.seed:>8}{slowest.seconds:>9.1f}s{slowest.seed:>8}")
    made, broken = (sum(numbers[i] for numbers in counts.values()) for i in (0, 1))
    print(f"{made} attacks, {broken} broke a promise; a margin is relative, broken above {TOLERANCE:g}.")
    return broken


def main() -> int:
    names = [promise.__name__ for promise in PROMISES]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--promise", action="append", choices=names, help="only this; may be given several times")
    parser.add_argument("--seed", type=int, help="only this seed")
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    chosen = given.promise or names
    silence()
    if given.seed is not None:
        torch.set_num_threads(1)
        found = [attempt(promise, given.seed) for promise in PROMISES if promise.__name__ in chosen]
        for each in found:
            print(f"{each.promise} --seed {each.seed}: {each.margin.excess:.3g} in {each.seconds:.1f} s; {each.margin.about}")
        return int(any(is_broken(each.margin) for each in found))
    signal.signal(signal.SIGTERM, _interrupted)
    return int(report(with_progress(attempts(chosen, given.minutes, given.start, given.processes))) > 0)


if __name__ == "__main__":
    sys.exit(main())
