"""The documents of an image: descriptors, manifests, indexes; of OCI, and of Docker's version 2.

They come from registries and archives and are hostile: all fields are checked when they are
read. A document keeps the bytes that it was read from, since its digest is that of these bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.fields import MAX_DOCUMENT_BYTES, Fields, parse_object
from sandbox_kernel.image.image_config import History, ImageConfig
from sandbox_kernel.image.media import (
    ACCEPTED,
    CONFIGS,
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_LAYER,
    DOCKER_LAYER_GZIP,
    DOCKER_LAYER_ZSTD,
    DOCKER_MANIFEST,
    INDEXES,
    LAYERS,
    MANIFESTS,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_LAYER_ZSTD,
    OCI_MANIFEST,
    chain_id,
    check_digest,
    check_layer_type,
    digest_of,
    hex_of,
)
from sandbox_kernel.image.platform import Platform
from sandbox_kernel.model import Json

__all__ = [
    "ACCEPTED",
    "CONFIGS",
    "DOCKER_CONFIG",
    "DOCKER_INDEX",
    "DOCKER_LAYER",
    "DOCKER_LAYER_GZIP",
    "DOCKER_LAYER_ZSTD",
    "DOCKER_MANIFEST",
    "INDEXES",
    "LAYERS",
    "MANIFESTS",
    "MAX_DOCUMENT_BYTES",
    "OCI_CONFIG",
    "OCI_INDEX",
    "OCI_LAYER",
    "OCI_LAYER_GZIP",
    "OCI_LAYER_ZSTD",
    "OCI_MANIFEST",
    "Descriptor",
    "History",
    "ImageConfig",
    "Index",
    "Manifest",
    "Platform",
    "chain_id",
    "check_digest",
    "check_layer_type",
    "digest_of",
    "hex_of",
    "parse_document",
    "render_json",
]

REFERENCE_NAME = "org.opencontainers.image.ref.name"
_KNOWN = ("config", "layers", "manifests", "mediaType", "schemaVersion")
"""The keys that decide what a document is; some readers take them in any case."""


def render_json(value: Json | list[Json]) -> bytes:
    """Give a document as canonical JSON: keys sorted, no space, UTF-8."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


@dataclass(frozen=True)
class Descriptor:
    """What points to a blob: its type, digest and size."""

    media_type: str
    digest: str
    size_bytes: int
    platform: Platform | None = None
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def short_digest(self) -> str:
        """The first twelve hex digits, as Docker shows them."""
        return self.digest.partition(":")[2][:12]

    def annotation(self, key: str) -> str:
        """Give one annotation, or an empty text."""
        return dict(self.annotations).get(key, "")

    def as_json(self) -> Json:
        """Give the descriptor as it stands in a document."""
        found: Json = {
            "mediaType": self.media_type,
            "digest": self.digest,
            "size": self.size_bytes,
        }
        if self.platform is not None:
            found["platform"] = self.platform.as_json()
        if self.annotations:
            found["annotations"] = dict(self.annotations)
        return found

    @classmethod
    def from_json(cls, value: Mapping[str, object], what: str = "a descriptor") -> Descriptor:
        """Read a descriptor; raises ImageError, which calls it `what`."""
        fields = Fields(dict(value), what)
        try:
            digest = check_digest(fields.text("digest"))
        except ImageError as error:
            raise ImageError(f"{what}: {error.message}", hint=error.hint) from None
        platform = None
        if value.get("platform") is not None:
            platform = Platform.read(fields.object("platform"))
        return cls(
            media_type=fields.text("mediaType"),
            digest=digest,
            size_bytes=fields.size("size"),
            platform=platform,
            annotations=fields.pairs("annotations"),
        )


@dataclass(frozen=True)
class Manifest:
    """The manifest of one image for one platform; layers are the lowest first."""

    raw: bytes
    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: tuple[tuple[str, str], ...] = ()

    @property
    def digest(self) -> str:
        """The digest of the bytes as they came."""
        return digest_of(self.raw)

    @property
    def size_bytes(self) -> int:
        """What a transfer of config and layers takes."""
        return self.config.size_bytes + sum(layer.size_bytes for layer in self.layers)

    @classmethod
    def parse(cls, raw: bytes, media_type: str = "") -> Manifest:
        """Read a manifest; raises ImageError, also for an index."""
        found = parse_document(raw, media_type)
        if isinstance(found, Index):
            raise ImageError("an index stands where a manifest is due", hint="choose a platform")
        return found

    @classmethod
    def build(
        cls,
        config: Descriptor,
        layers: Iterable[Descriptor],
        annotations: Mapping[str, str] | None = None,
    ) -> Manifest:
        """Make a manifest in canonical form; it is Docker's if the config is, else OCI's."""
        media_type = DOCKER_MANIFEST if config.media_type == DOCKER_CONFIG else OCI_MANIFEST
        value: Json = {
            "schemaVersion": 2,
            "mediaType": media_type,
            "config": config.as_json(),
            "layers": [layer.as_json() for layer in layers],
        }
        if annotations:
            value["annotations"] = dict(annotations)
        return cls.parse(render_json(value), media_type)


@dataclass(frozen=True)
class Index:
    """A list of manifests (or of indexes), of which each platform takes its own."""

    raw: bytes
    media_type: str
    manifests: tuple[Descriptor, ...]

    @property
    def digest(self) -> str:
        """The digest of the bytes as they came."""
        return digest_of(self.raw)

    def choose(self, wanted: Platform | None = None) -> Descriptor:
        """Give the entry for a platform (this machine's, if none is named); raises ImageError.

        An entry without a platform is taken if none fits and it is the only one.
        """
        wanted = wanted or Platform.host()
        known = [one for one in self.manifests if one.media_type in MANIFESTS | INDEXES]
        fits = [
            (score, one)
            for one in known
            if one.platform is not None and (score := wanted.takes(one.platform)) > 0
        ]
        if fits:
            return max(fits, key=lambda pair: pair[0])[1]
        plain = [one for one in known if one.platform is None]
        if len(plain) == 1:
            return plain[0]
        there = sorted({str(one.platform) for one in known if one.platform is not None})
        raise ImageError(
            f"the index has no image for {wanted}",
            hint=f"it has {', '.join(there) or 'none with a platform'}",
        )


def parse_document(raw: bytes, media_type: str = "") -> Manifest | Index:
    """Read a manifest or an index; raises ImageError.

    `media_type` is what its sender calls it. A document that could be read as both, or that
    calls itself another type than its sender does, is refused (CVE-2021-41190).
    """
    value = parse_object(raw, "the manifest")
    for key in value:
        if key not in _KNOWN and key.lower() in {known.lower() for known in _KNOWN}:
            raise ImageError(f"the manifest is ambiguous: it has the key {key!r}")
    _refuse_old(value, media_type)
    fields = Fields(value, "the manifest")
    is_index, is_manifest = "manifests" in value, "layers" in value or "config" in value
    if is_index and is_manifest:
        raise ImageError("the manifest is ambiguous: it has manifests, and layers or a config")
    if not is_index and not is_manifest:
        raise ImageError("the manifest has neither layers nor manifests")
    kind = _settle_type(fields.text("mediaType"), media_type, is_index=is_index)
    if is_index:
        entries = tuple(
            Descriptor.from_json(one.values, one.what) for one in fields.objects("manifests")
        )
        return Index(raw, kind, entries)
    return _manifest(raw, kind, fields)


def _refuse_old(value: Json, media_type: str) -> None:
    if (
        value.get("schemaVersion") == 1
        or "distribution.manifest.v1" in media_type
        or "fsLayers" in value
    ):
        raise ImageError(
            "the manifest is of Docker's schema 1, which nobody can verify",
            hint="push the image again with a current Docker",
        )
    if value.get("schemaVersion") != 2:
        raise ImageError(f"the manifest's schemaVersion is {value.get('schemaVersion')!r}, not 2")


def _settle_type(inside: str, outside: str, *, is_index: bool) -> str:
    outside = outside.partition(";")[0].strip()
    if inside and outside and inside != outside:
        raise ImageError(
            f"the manifest is ambiguous: it calls itself {inside[:200]!r}, "
            f"its sender {outside[:200]!r}"
        )
    kind = inside or outside or (OCI_INDEX if is_index else OCI_MANIFEST)
    if kind not in INDEXES | MANIFESTS:
        raise ImageError(f"the manifest has the unknown media type {kind[:200]!r}")
    if (kind in INDEXES) != is_index:
        shape = "an index" if is_index else "a manifest"
        raise ImageError(f"the manifest is ambiguous: {kind}, but with the fields of {shape}")
    return kind


def _manifest(raw: bytes, kind: str, fields: Fields) -> Manifest:
    config = Descriptor.from_json(fields.object("config").values, "the manifest's config")
    if config.media_type not in CONFIGS:
        raise ImageError(
            f"this is no image: its config has the media type {config.media_type[:200]!r}",
            hint="it may be an artifact of another program",
        )
    layers = tuple(Descriptor.from_json(one.values, one.what) for one in fields.objects("layers"))
    for number, layer in enumerate(layers):
        check_layer_type(layer.media_type, f"layer {number}")
    return Manifest(raw, kind, config, layers, fields.pairs("annotations"))
