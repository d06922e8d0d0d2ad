"""Names of the documents and layers of images: digests, and media types of OCI and Docker."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from sandbox_kernel.errors import ImageError

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"

MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})
LAYERS = {
    OCI_LAYER: "",
    OCI_LAYER_GZIP: "gzip",
    OCI_LAYER_ZSTD: "zstd",
    DOCKER_LAYER: "",
    DOCKER_LAYER_GZIP: "gzip",
    DOCKER_LAYER_ZSTD: "zstd",
}
"""Media types of layers, each with its compression."""
ACCEPTED = (OCI_INDEX, OCI_MANIFEST, DOCKER_INDEX, DOCKER_MANIFEST)
"""What a registry may answer when it is asked for an image."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)


def check_digest(text: object) -> str:
    """Give the digest back if it is `sha256:` and 64 lower-case hex digits; raises ImageError."""
    if not isinstance(text, str) or _DIGEST.fullmatch(text) is None:
        raise ImageError(
            f"{str(text)[:200]!r} is not a digest", hint="it is sha256: and 64 hex digits"
        )
    return text


def digest_of(data: bytes) -> str:
    """Give the digest of these bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def hex_of(digest: str) -> str:
    """Give the 64 hex digits, which name files of the store; raises ImageError."""
    return check_digest(digest).partition(":")[2]


def chain_id(diff_ids: Sequence[str]) -> str:
    """Give the ChainID of these layers, the lowest first; raises ImageError for none.

    Source: OCI image-spec, config.md, "Layer ChainID".
    """
    if not diff_ids:
        raise ImageError("no layers have no chain ID")
    chain = check_digest(diff_ids[0])
    for diff_id in diff_ids[1:]:
        chain = digest_of(f"{chain} {check_digest(diff_id)}".encode())
    return chain


def check_layer_type(media_type: str, where: str) -> str:
    """Give the media type back if it is one of a layer that can be read; raises ImageError."""
    if media_type in LAYERS:
        return media_type
    if "foreign" in media_type or "nondistributable" in media_type:
        raise ImageError(
            f"{where} is a foreign layer ({media_type})", hint="its content is not in the image"
        )
    raise ImageError(f"{where} has the unknown media type {media_type[:200]!r}")
