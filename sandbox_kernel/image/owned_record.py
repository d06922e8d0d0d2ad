"""What is known of the owned folder of a layer: for which ids it was made, and what it holds.

It lies beside the layer's own tree: `owned/fs`, if there is anything in it, and `owned/owned.json`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import render_json
from sandbox_kernel.image.fields import Fields, parse_object
from sandbox_kernel.linux.idmap import IdMap

FOLDER = "owned"
RECORD = "owned.json"


@dataclass(frozen=True)
class OwnedRecord:
    """One owned folder; `size_bytes` is what its files hold."""

    ids: str
    """The map that it was made with, as `words_of` says it; empty if it is good for any."""
    entries: int
    size_bytes: int
    boot: str
    settled: bool

    def fits(self, ids: IdMap) -> bool:
        """Tell whether it shows what it should in a namespace with these ids."""
        return self.ids in ("", words_of(ids))

    def render(self) -> bytes:
        """Give the document of the folder."""
        return render_json(
            {
                "ids": self.ids,
                "entries": self.entries,
                "size": self.size_bytes,
                "boot": self.boot,
                "settled": self.settled,
            }
        )


def words_of(ids: IdMap) -> str:
    """Say a map such that two are the same if their words are."""
    return json.dumps([ids.uids, ids.gids], separators=(",", ":"))


def read_record(layer: Path, boot: str) -> OwnedRecord | None:
    """Give what is known of the owned folder of a layer's folder.

    None if there is none, or it was never flushed and the machine is not in that `boot` any more.
    """
    path = layer / FOLDER / RECORD
    try:
        fields = Fields(parse_object(path.read_bytes(), str(path)), str(path))
        found = OwnedRecord(
            ids=fields.text("ids"),
            entries=fields.size("entries"),
            size_bytes=fields.size("size"),
            boot=fields.text("boot"),
            settled=fields.flag("settled"),
        )
    except (FileNotFoundError, ImageError):
        return None
    return found if found.settled or found.boot == boot else None
