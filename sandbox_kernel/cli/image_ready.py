"""Make an image ready for sessions, with progress."""

from __future__ import annotations

from sandbox_kernel.build.session_image import session_image
from sandbox_kernel.cli.image_screen import shown
from sandbox_kernel.cli.image_store import opened_store, read_reference
from sandbox_kernel.cli.image_text import harmless, short
from sandbox_kernel.errors import ConfigError


def make_ready(text: str, waived: frozenset[str]) -> None:
    """Unpack an image and prepare what cells need in it; raises ImageError, ConfigError for an ID.

    A kernel finds its image by name each time it starts.
    """
    with shown() as screen, opened_store(unpacks=True) as store:
        image = store.resolve(text)
        named = image.reference
        if named is None or named.name != read_reference(text).name:
            tag = f"sandbox-kernel image tag {short(image.image_id)} NAME"
            raise ConfigError(f"--image {text} is an ID, not a name", hint=f"give it one: {tag}")
        session_image(text, lambda words: screen.line(harmless(words)), screen, waived)
