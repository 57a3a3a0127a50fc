"""What happens when: hooks that act on a model while it trains."""

from .attach import Handle, attach
from .base import Hook
from .clip import SpectralClip

__all__ = ["Handle", "Hook", "SpectralClip", "attach"]
