"""Which image a text means: a name, a digest, or the beginning of one."""

from __future__ import annotations

import re

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import (
    Descriptor,
    ImageConfig,
    Index,
    Manifest,
    parse_document,
)
from sandbox_kernel.image.prune import Parts
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store_refs import name_of
from sandbox_kernel.image.stored_image import StoredImage

MAX_NESTED = 4
"""How deep indexes in indexes are followed."""
_PREFIX = re.compile(r"(?:sha256:)?([0-9a-f]{4,64})", re.ASCII)
_HINT = "see `sandbox-kernel image list`, or pull it"


def all_images(parts: Parts) -> tuple[StoredImage, ...]:
    """Give all images whose documents can be read, once for each name."""
    found = []
    for entry in parts.refs.entries():
        try:
            found.append(_load(parts, entry))
        except ImageError:
            continue
    return tuple(found)


def find(parts: Parts, text: str) -> StoredImage:
    """Give the image that a text means; raises ImageError."""
    return _load(parts, _entries(parts, text)[0])


def untag(parts: Parts, text: str, *, force: bool) -> tuple[str, ...]:
    """Take the name away that a text is, or, for a digest, all names; give them."""
    entries = _entries(parts, text)
    names = tuple(filter(None, map(name_of, entries)))
    wanted = _reference(text)
    if names and wanted is not None and _is_named(entries[0], wanted):
        parts.refs.remove(names[0])
        return names[:1]
    if len(names) > 1 and not force:
        raise ImageError(
            f"{text!r} has the names {', '.join(names)}", hint="name one of them, or use --force"
        )
    parts.refs.drop([entries[0].digest])
    return names


def _is_named(entry: Descriptor, wanted: Reference) -> bool:
    # Another program may have written a short form.
    name = _reference(name_of(entry))
    return name is not None and name.full == wanted.full


def _reference(text: str) -> Reference | None:
    try:
        return Reference.parse(text)
    except ImageError:
        return None


def _entries(parts: Parts, text: str) -> tuple[Descriptor, ...]:
    """Give the entries that a text means, all of one image; a name comes before a digest."""
    entries = parts.refs.entries()
    found = _by_name(entries, text) or _by_digest(parts, entries, text)
    if found:
        return found
    reference = None if _PREFIX.fullmatch(text) else Reference.parse(text)
    name = str(reference) if reference is not None else text
    raise ImageError(f"there is no image {name!r} in the store", hint=_HINT)


def _by_name(entries: tuple[Descriptor, ...], text: str) -> tuple[Descriptor, ...]:
    wanted = _reference(text)
    if wanted is None:
        return ()
    exact = tuple(one for one in entries if _is_named(one, wanted))
    if exact or not wanted.digest:
        return exact
    same = []
    for one in entries:
        name = _reference(name_of(one))
        if name is not None and name.name == wanted.name and one.digest == wanted.digest:
            same.append(one)
    return tuple(same)


def _by_digest(parts: Parts, entries: tuple[Descriptor, ...], text: str) -> tuple[Descriptor, ...]:
    match = _PREFIX.fullmatch(text)
    if match is None:
        return ()
    start = f"sha256:{match[1]}"
    found = [
        one
        for one in entries
        if one.digest.startswith(start) or _image_id(parts, one).startswith(start)
    ]
    if len({one.digest for one in found}) > 1:
        raise ImageError(
            f"{text!r} is ambiguous: it begins the digests of several images",
            hint="write more digits",
        )
    return tuple(found)


def _image_id(parts: Parts, entry: Descriptor) -> str:
    try:
        return _manifest(parts, entry).config.digest
    except ImageError:
        return ""


def _manifest(parts: Parts, entry: Descriptor) -> Manifest:
    for _ in range(MAX_NESTED):
        found = parse_document(parts.blobs.read(entry.digest), entry.media_type)
        if not isinstance(found, Index):
            return found
        # Another program may have put an index of several platforms here.
        entry = found.choose()
    raise ImageError(f"{entry.digest} is an index in an index, {MAX_NESTED} deep")


def _load(parts: Parts, entry: Descriptor) -> StoredImage:
    manifest = _manifest(parts, entry)
    config = ImageConfig.parse(parts.blobs.read(manifest.config.digest))
    if len(config.diff_ids) != len(manifest.layers):
        raise ImageError(f"the image {entry.digest} has not as many DiffIDs as layers")
    return StoredImage(
        reference=_reference(name_of(entry)),
        digest=entry.digest,
        manifest=manifest,
        config=config,
        size_bytes=manifest.size_bytes,
        created=config.created,
    )
