"""Names of images: the store's `index.json`, changed by one process at a time.

It is the index of an OCI layout, so other programs read the store as one. An entry without a
name is an image that lost it, or never had one; Docker calls it dangling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from sandbox_kernel.image.documents import (
    OCI_INDEX,
    REFERENCE_NAME,
    Descriptor,
    render_json,
)
from sandbox_kernel.image.fields import Fields, parse_object
from sandbox_kernel.image.store_files import Staging, write_whole
from sandbox_kernel.image.store_locks import INDEX, Locks

LAYOUT_FILE = "oci-layout"
INDEX_FILE = "index.json"
LAYOUT = b'{"imageLayoutVersion":"1.0.0"}'


def read_index(raw: bytes, what: str) -> tuple[Descriptor, ...]:
    """Give the entries of an index.json; raises ImageError."""
    fields = Fields(parse_object(raw, what), what)
    return tuple(Descriptor.from_json(one.values, one.what) for one in fields.objects("manifests"))


def render_index(entries: Iterable[Descriptor]) -> bytes:
    """Give the index.json with these entries."""
    found = [entry.as_json() for entry in entries]
    return render_json({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": found})


def named(entry: Descriptor, name: str) -> Descriptor:
    """Give an entry under another name; an empty one takes the name away."""
    others = tuple(pair for pair in entry.annotations if pair[0] != REFERENCE_NAME)
    return replace(entry, annotations=(*others, (REFERENCE_NAME, name)) if name else others)


def name_of(entry: Descriptor) -> str:
    """Give the name of an entry, or an empty text."""
    return entry.annotation(REFERENCE_NAME)


class Refs:
    """The entries of one `index.json`."""

    def __init__(self, root: Path, locks: Locks, staging: Staging) -> None:
        self._path = root / INDEX_FILE
        self._layout = root / LAYOUT_FILE
        self._locks = locks
        self._staging = staging

    def create(self) -> None:
        """Make an empty layout where there is none."""
        if self._layout.exists() and self._path.exists():
            return
        with self._locks.held(INDEX):
            if not self._path.exists():
                write_whole(self._path, render_index(()), self._staging)
            if not self._layout.exists():
                write_whole(self._layout, LAYOUT, self._staging)

    def entries(self) -> tuple[Descriptor, ...]:
        """Give all entries, in the order in which they came; raises ImageError."""
        return read_index(self._path.read_bytes(), "the store's index.json")

    def put(self, name: str, entry: Descriptor) -> None:
        """Let a name point to an image; with an empty name it is kept without one.

        Who had the name before stays, without a name if that was the only one.
        """

        def change(entries: tuple[Descriptor, ...]) -> list[Descriptor]:
            kept = []
            for one in entries:
                if one.digest == entry.digest and name_of(one) in {"", name}:
                    continue
                kept.append(named(one, "") if name and name_of(one) == name else one)
            again = any(one.digest == entry.digest for one in kept)
            return kept if again and not name else [*kept, named(entry, name)]

        self._change(change)

    def remove(self, name: str) -> None:
        """Take a name away, and the entry with it."""
        self._change(lambda entries: [one for one in entries if name_of(one) != name])

    def drop(self, digests: Iterable[str]) -> None:
        """Take all entries of these images away."""
        gone = frozenset(digests)
        self._change(lambda entries: [one for one in entries if one.digest not in gone])

    def _change(self, change: Callable[[tuple[Descriptor, ...]], Iterable[Descriptor]]) -> None:
        with self._locks.held(INDEX):
            before = self.entries()
            after = _without_doubles(change(before))
            if after != before:
                write_whole(self._path, render_index(after), self._staging)


def _without_doubles(entries: Iterable[Descriptor]) -> tuple[Descriptor, ...]:
    """Drop nameless entries of images that have a name, or that stand there twice."""
    found = list(entries)
    have_names = {one.digest for one in found if name_of(one)}
    kept: dict[tuple[str, str], Descriptor] = {}
    for one in found:
        if name_of(one) or one.digest not in have_names:
            kept[one.digest, name_of(one)] = one
    return tuple(kept.values())


def read_layout_version(raw: bytes, what: str) -> str:
    """Give the version of an `oci-layout` file; raises ImageError."""
    return Fields(parse_object(raw, what), what).text("imageLayoutVersion")
