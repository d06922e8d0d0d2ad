"""Progress on stderr: lines wherever it goes, or bars on a terminal (`image_bars`).

A screen shows blobs that move (it is the `Progress` of transfers, imports and unpacking, and may
be called from several threads), and steps, one after the other, with what they say.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sandbox_kernel.cli.image_text import harmless, put, short
from sandbox_kernel.errors import ConfigError
from sandbox_kernel.units import format_size

MODES = ("auto", "plain", "tty")
TELL_INTERVAL_S = 10.0
"""How often a line says how far a blob is."""
_NO_NEWS = frozenset({"exists", "shared"})


class Screen:
    """One that shows nothing; the others are made of it."""

    moved = False
    """Whether a blob has moved since the step began."""

    def title(self, text: str) -> None:
        """Say what is done now."""

    def line(self, text: str, style: str = "") -> None:
        """Show a line; `style` is one of rich's, for a terminal."""

    def begin(self, tag: str, text: str, done: tuple[int, int]) -> None:
        """Show that a step begins: its number as `[2/6]`, its words, and how many are done."""
        self.moved = False

    def end(self, result: str, style: str = "") -> None:
        """Show how the step ended: behind its words, or below what it said."""

    def started(self, digest: str, total_bytes: int) -> None:
        """Take note of a blob that is looked at now."""

    def advanced(self, digest: str, count_bytes: int) -> None:
        """Take note of so many bytes more."""

    def finished(self, digest: str, note: str) -> None:
        """Take note of the end of a blob, and of what became of it."""
        if note not in _NO_NEWS:
            self.moved = True

    def close(self) -> None:
        """Leave stderr as a next line needs it."""


@dataclass
class _Blob:
    total_bytes: int
    done_bytes: int = 0
    told_s: float = 0.0


class PlainScreen(Screen):
    """Lines, for files and pipes."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._blobs: dict[str, _Blob] = {}
        self._tag = ""
        self._is_open = False
        """Whether the line of the step waits for its result."""

    def title(self, text: str) -> None:
        """Say what is done now."""
        self.line(text)

    def line(self, text: str, style: str = "") -> None:
        """Show a line."""
        with self._mutex:
            self._break()
            put(text, err=True)

    def begin(self, tag: str, text: str, done: tuple[int, int]) -> None:
        """Show that a step begins; its line stays open until it ends or says something."""
        super().begin(tag, text, done)
        with self._mutex:
            self._break()
            put(f"{tag} {text}", err=True, newline=False)
            self._tag, self._is_open = tag, True

    def end(self, result: str, style: str = "") -> None:
        """Show how the step ended."""
        with self._mutex:
            put(f"  {result}" if self._is_open else f"{self._tag} done: {result}", err=True)
            self._is_open = False

    def started(self, digest: str, total_bytes: int) -> None:
        """Take note of a blob."""
        self._blobs[digest] = _Blob(total_bytes, told_s=time.monotonic())

    def advanced(self, digest: str, count_bytes: int) -> None:
        """Say now and then how far it is."""
        blob = self._blobs.setdefault(digest, _Blob(0, told_s=time.monotonic()))
        blob.done_bytes += count_bytes
        now_s = time.monotonic()
        if now_s - blob.told_s >= TELL_INTERVAL_S:
            blob.told_s = now_s
            total = f" of {format_size(blob.total_bytes)}" if blob.total_bytes else ""
            self.line(f"{blob_name(digest)}: {format_size(blob.done_bytes)}{total}")

    def finished(self, digest: str, note: str) -> None:
        """Say what became of it, if it had to be moved."""
        super().finished(digest, note)
        blob = self._blobs.pop(digest, None)
        if note not in _NO_NEWS and blob is not None:
            self.line(f"{blob_name(digest)}: {note}, {format_size(blob.total_bytes)}")

    def close(self) -> None:
        """End a line that is open."""
        with self._mutex:
            self._break()

    def _break(self) -> None:
        if self._is_open:
            put("", err=True)
            self._is_open = False


def blob_name(digest: str) -> str:
    """Give what a screen calls a blob; one whose digest is not known yet goes by its file."""
    return short(digest) or harmless(digest)[:12]


@contextmanager
def shown(title: str = "", *, mode: str = "auto", quiet: bool = False) -> Iterator[Screen]:
    """Open the screen that fits stderr; `mode` is one of MODES. Raises ConfigError."""
    screen = _screen(mode, quiet=quiet)
    try:
        if title:
            screen.title(title)
        yield screen
    finally:
        screen.close()


def _screen(mode: str, *, quiet: bool) -> Screen:
    is_terminal = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if mode == "tty" and not is_terminal:
        raise ConfigError(
            "--progress tty: stderr is no terminal that can show bars",
            hint="use --progress plain or auto",
        )
    if quiet:
        return Screen()
    if mode == "plain" or not is_terminal:
        return PlainScreen()
    from sandbox_kernel.cli.image_bars import BarScreen  # noqa: PLC0415 - rich is slow to import

    return BarScreen()
