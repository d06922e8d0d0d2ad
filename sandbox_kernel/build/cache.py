"""The build cache: what a step made, by all that it depends on.

The key of a step is a hash over the key of the step before and the step's own parts, so a change
leads to a miss of that step and of all behind it, as Docker's users expect. Times of files are no
part, nor are limits and mounts of caches and secrets. A failed step leaves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from sandbox_kernel.build.layer import Layer
from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import Descriptor
from sandbox_kernel.image.fields import Fields
from sandbox_kernel.image.media import check_digest, digest_of
from sandbox_kernel.image.store import Store
from sandbox_kernel.model import Json

FORMAT = 1
"""Goes up when the same parts would give another layer than before."""


@dataclass(frozen=True)
class Key:
    """What a step depends on."""

    parent: str
    """The key of the step before, or of what the stage begins with."""
    parts: tuple[tuple[str, str], ...]
    """What else, by names that a user knows: `instruction`, `environment`, `files`."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Hashes by path of what `files` sums up, to tell which one has changed."""

    @property
    def digest(self) -> str:
        """The name of the step's record."""
        value = [FORMAT, self.parent, self.parts]
        return digest_of(json.dumps(value, sort_keys=True).encode())


@dataclass(frozen=True)
class Hit:
    """What the cache holds for a key; no layer for a step that changed no file."""

    layer: Layer | None


class BuildCache:
    """The records of steps in a store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def find(self, key: Key) -> Hit | None:
        """Give what a step made before, if its layer is still there."""
        record = self._store.records.get(key.digest)
        if record is None:
            return None
        if record.value.get("changed") is False:
            return Hit(None)
        try:
            fields = Fields(record.value, "a record of the build cache")
            blob = Descriptor.from_json(fields.object("blob").values)
            layer = Layer(blob, check_digest(fields.text("diff_id")))
        except ImageError:
            return None
        return Hit(layer) if self._store.has_blob(blob.digest) else None

    def was_built(self, key: Key) -> bool:
        """Tell whether there is a record, also one whose layer is gone."""
        return self._store.records.get(key.digest, used=False) is not None

    def put(self, key: Key, layer: Layer | None) -> None:
        """Keep what a step made."""
        value: Json = {"digests": [], "changed": False}
        if layer is not None:
            value = {"digests": [layer.blob.digest], "changed": True, **layer.as_json()}
        self._store.records.put(key.digest, value)
