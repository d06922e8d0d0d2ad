"""Images of an OCI layout, which is a folder or a tar. Source: OCI image-spec, image-layout.md."""

from __future__ import annotations

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.archive_parts import (
    MAX_IMAGES,
    MAX_LAYERS,
    Found,
    ImportOptions,
    check_count,
    parse_name,
    take_blob,
)
from sandbox_kernel.image.archive_source import Source, read_document
from sandbox_kernel.image.documents import (
    INDEXES,
    MANIFESTS,
    MAX_DOCUMENT_BYTES,
    OCI_INDEX,
    Descriptor,
    Index,
    Manifest,
    digest_of,
    hex_of,
    parse_document,
)
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.store_refs import (
    INDEX_FILE,
    LAYOUT_FILE,
    name_of,
    read_index,
    read_layout_version,
)

FULL_NAME = "io.containerd.image.name"
"""Docker and containerd put the whole reference here, and only the tag where OCI has it."""
MAX_NESTED = 4


def is_layout(source: Source) -> bool:
    """Tell whether this is an OCI layout."""
    return source.has(LAYOUT_FILE) and source.has(INDEX_FILE)


def take_layout(store: Store, source: Source, options: ImportOptions) -> tuple[Found, ...]:
    """Copy the blobs of all images into the store; raises ImageError.

    Entries of one name are an image for several platforms, of which one is taken.
    """
    version = read_layout_version(read_document(source, LAYOUT_FILE), "the archive's oci-layout")
    if version.partition(".")[0] != "1":
        raise ImageError(f"the OCI layout has the version {version[:50]!r}", hint="1.0.0 is known")
    raw = read_document(source, INDEX_FILE)
    groups: dict[str, list[Descriptor]] = {}
    for entry in read_index(raw, "the archive's index.json"):
        if entry.media_type in MANIFESTS | INDEXES:
            groups.setdefault(_name(entry), []).append(entry)
    check_count("images", len(groups), MAX_IMAGES)
    if not groups:
        raise ImageError("the archive's index.json names no image")
    found: dict[str, tuple[Manifest, list[Reference]]] = {}
    for name, entries in groups.items():
        index = Index(raw, OCI_INDEX, tuple(dict.fromkeys(entries)))
        entry = index.manifests[0] if len(index.manifests) == 1 else index.choose(options.platform)
        manifest = _manifest(source, entry, options)
        _, names = found.setdefault(manifest.digest, (manifest, []))
        names += filter(None, [parse_name(name)])
    for manifest, _ in found.values():
        _take_blobs(store, source, manifest, options)
    return tuple(Found(manifest, tuple(names)) for manifest, names in found.values())


def _name(entry: Descriptor) -> str:
    return entry.annotation(FULL_NAME) or name_of(entry)


def _manifest(source: Source, entry: Descriptor, options: ImportOptions) -> Manifest:
    """Give the manifest that an entry leads to, through indexes of platforms."""
    for _ in range(MAX_NESTED):
        raw = _document(source, entry)
        found = parse_document(raw, entry.media_type)
        if not isinstance(found, Index):
            check_count("layers", len(found.layers), MAX_LAYERS)
            return found
        entry = found.choose(options.platform)
    raise ImageError(f"the archive has an index in an index, {MAX_NESTED} deep")


def _document(source: Source, entry: Descriptor) -> bytes:
    if entry.size_bytes > MAX_DOCUMENT_BYTES:
        raise ImageError(f"the manifest {entry.digest} has {entry.size_bytes} bytes")
    raw = read_document(source, blob_name(entry.digest))
    if len(raw) != entry.size_bytes:
        raise ImageError(
            f"the manifest {entry.digest} has {len(raw)} bytes, its descriptor says "
            f"{entry.size_bytes}"
        )
    if digest_of(raw) != entry.digest:
        raise ImageError(f"the digest of the manifest {entry.digest} does not match its bytes")
    return raw


def _take_blobs(store: Store, source: Source, manifest: Manifest, options: ImportOptions) -> None:
    for blob in (manifest.config, *manifest.layers):
        if store.has_blob(blob.digest):
            continue
        with source.open(blob_name(blob.digest)) as file:
            take_blob(store, blob, file, options.progress)


def blob_name(digest: str) -> str:
    """Give where a blob lies in a layout; raises ImageError."""
    return f"blobs/sha256/{hex_of(digest)}"
