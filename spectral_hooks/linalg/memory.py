"""How much is held at once: work on many frequencies, matrices or groups goes in chunks that count all that they hold."""

from __future__ import annotations

#: Bytes that stay in caches, and for which allocators use the same memory again: for what is read many times, as by a proof.
CACHED = 1 << 23
#: Bytes of what is read once: so many that the overhead of a call does not count.
STREAMED = 1 << 26


def at_once(bytes_each: int, most: int | None = None) -> int:
    """How many things of this size are held at once: at least one, in `STREAMED` bytes unless told."""
    return max((STREAMED if most is None else most) // max(bytes_each, 1), 1)
