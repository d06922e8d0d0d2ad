"""Small images for tests: layers are tars of a few files."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.image.documents import (
    OCI_CONFIG,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    Descriptor,
    History,
    ImageConfig,
    Manifest,
    Platform,
    digest_of,
)
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage

EPOCH = "1970-01-01T00:00:00Z"


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """Give a tar with these files, and the folders above them."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        folders = {
            "/".join(name.split("/")[:depth])
            for name in files
            for depth in range(1, name.count("/") + 1)
        }
        for folder in sorted(folders):
            info = tarfile.TarInfo(folder)
            info.type = tarfile.DIRTYPE
            info.mode = 0o755
            tar.addfile(info)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


@dataclass(frozen=True)
class FakeImage:
    """An image as bytes: config, manifest, and all blobs by digest."""

    manifest: Manifest
    config: ImageConfig
    blobs: dict[str, bytes]

    def put(self, store: Store, name: str | None) -> StoredImage:
        """Put it into a store."""
        for data in self.blobs.values():
            store.put_blob(data)
        return store.put_image(name, self.manifest.raw, self.manifest.media_type)

    def missing(self, store: Store) -> list[str]:
        """Give what of it is not in the store."""
        return [digest for digest in self.blobs if not store.has_blob(digest)]


def image_of(
    layers: Sequence[Mapping[str, bytes]], *, zipped: bool = True, cmd: Sequence[str] = ("/bin/sh",)
) -> FakeImage:
    """Make an image of layers of files, the lowest first."""
    tars = [tar_of(files) for files in layers]
    kept = [gzip.compress(tar, mtime=0) if zipped else tar for tar in tars]
    kind = OCI_LAYER_GZIP if zipped else OCI_LAYER
    config = ImageConfig(
        platform=Platform.host(),
        diff_ids=tuple(digest_of(tar) for tar in tars),
        env=(("PATH", "/bin"),),
        cmd=tuple(cmd),
        history=tuple(History(EPOCH, f"step {n}") for n in range(len(tars))),
    ).replace(created=EPOCH)
    manifest = Manifest.build(
        Descriptor(OCI_CONFIG, config.image_id, len(config.raw)),
        [Descriptor(kind, digest_of(data), len(data)) for data in kept],
    )
    blobs = {digest_of(data): data for data in (*kept, config.raw, manifest.raw)}
    return FakeImage(manifest, config, blobs)


def problems(store: Store) -> list[str]:
    """Give what is wrong with a store: every name must lead to whole images, every blob be true."""
    found = []
    for path in sorted((store.folder / "blobs/sha256").iterdir()):
        if digest_of(path.read_bytes()) != f"sha256:{path.name}":
            found.append(f"blob {path.name} is not what it is called")
    entries = json.loads((store.folder / "index.json").read_bytes())["manifests"]
    images = store.images()
    if len(images) != len(entries):
        found.append(f"{len(entries)} entries, but {len(images)} images")
    for image in images:
        for blob in (image.manifest.config, *image.manifest.layers):
            if not (store.folder / "blobs/sha256" / blob.digest[7:]).exists():
                found.append(f"{image.reference}: {blob.digest} is missing")
    for folder in sorted((store.folder / "layers/sha256").iterdir()):
        record = json.loads((folder / "layer.json").read_bytes())
        found += _differences(store, folder / "fs", record["blob"])
    return found


def _differences(store: Store, tree: Path, blob: str) -> list[str]:
    """Compare an unpacked layer with the files of its tar."""
    with tarfile.open(fileobj=io.BytesIO(store.read_blob(blob)), mode="r:*") as tar:
        return [
            f"{tree / member.name} is not as in {blob}"
            for member in tar
            if member.isreg()
            and "/.wh." not in f"/{member.name}"
            and (tree / member.name).read_bytes() != tar.extractfile(member).read()  # type: ignore[union-attr]
        ]
