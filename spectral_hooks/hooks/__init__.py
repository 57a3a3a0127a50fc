"""What happens when: hooks that act on a model while it trains."""

from .attach import Handle as Handle
from .attach import Hook as Hook
from .attach import attach as attach
from .clip import SpectralClip as SpectralClip
