"""Records of the build cache: what a step made, by the key of the step.

A record is a JSON object; its list `digests` names the blobs and layers that it keeps alive. What
else stands in it is the builder's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import render_json
from sandbox_kernel.image.fields import Fields, parse_object
from sandbox_kernel.image.media import check_digest, hex_of
from sandbox_kernel.image.store_files import Staging, write_whole
from sandbox_kernel.model import Json


@dataclass(frozen=True)
class CacheRecord:
    """One record; `used_s` is when it was last written or found, in seconds since 1970."""

    key: str
    digests: tuple[str, ...]
    used_s: float
    value: Json


class CacheRecords:
    """The records in one folder; keys are digests."""

    def __init__(self, folder: Path, staging: Staging) -> None:
        self._folder = folder
        self._staging = staging

    def get(self, key: str, *, used: bool = True) -> CacheRecord | None:
        """Give a record, None if there is none; `used` notes that it was of use just now.

        A record that cannot be read counts as missing: the step is then built again.
        """
        path = self._path(key)
        try:
            raw = path.read_bytes()
            if used:
                os.utime(path)
            used_s = path.stat().st_mtime
            value = parse_object(raw, f"the cache record {key}")
            digests = Fields(value, f"the cache record {key}").texts("digests")
            return CacheRecord(key, tuple(map(check_digest, digests)), used_s, value)
        except (FileNotFoundError, ImageError):
            return None

    def put(self, key: str, value: Mapping[str, object]) -> None:
        """Write a record; raises ImageError if its `digests` are not such."""
        for digest in Fields(dict(value), "the cache record").texts("digests"):
            check_digest(digest)
        write_whole(self._path(key), render_json(dict(value)), self._staging)

    def remove(self, key: str) -> None:
        """Forget a record."""
        self._path(key).unlink(missing_ok=True)

    def all(self) -> tuple[CacheRecord, ...]:
        """Give all records, the one that was used last at the end; those unreadable are removed."""
        found = []
        for name in os.listdir(self._folder):
            record = self.get(f"sha256:{name}", used=False)
            if record is None:
                self.remove(f"sha256:{name}")
            else:
                found.append(record)
        return tuple(sorted(found, key=lambda record: (record.used_s, record.key)))

    def _path(self, key: str) -> Path:
        return self._folder / hex_of(key)
