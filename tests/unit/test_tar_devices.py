"""The device nodes that debootstrap leaves in a tar: found, and nothing else left out."""

from __future__ import annotations

import io
import tarfile

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.tar_devices import device_ranges, kept

LONG = "d" * 120


def tar(entries: list[tuple[str, bytes, bytes]], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as file:
        for name, type_, content in entries:
            info = tarfile.TarInfo(name)
            info.type, info.size = type_, len(content)
            info.devmajor, info.devminor = 1, 3
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def without(data: bytes) -> list[tuple[str, bytes]]:
    file = io.BytesIO(data)
    left = b"".join(kept(file, device_ranges(file), 1000))
    with tarfile.open(fileobj=io.BytesIO(left)) as found:
        return [
            (one.name, stream.read() if (stream := found.extractfile(one)) else b"")
            for one in found
        ]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_nodes_below_dev_go_and_all_else_stays(kind: int) -> None:
    data = tar(
        [
            ("./", tarfile.DIRTYPE, b""),
            ("./dev/", tarfile.DIRTYPE, b""),
            ("./dev/null", tarfile.CHRTYPE, b""),
            ("./dev/" + LONG[:80], tarfile.BLKTYPE, b""),
            ("./dev/note", tarfile.REGTYPE, b"x" * 700),
            ("./etc/one", tarfile.REGTYPE, b"y" * 512),
            ("dev/zero", tarfile.CHRTYPE, b""),
        ],
        kind,
    )
    names = [name.removeprefix("./") for name, _ in without(data)]
    assert names == [".", "dev", "dev/note", "etc/one"]
    assert dict(without(data))["./dev/note"] == b"x" * 700


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_long_name_goes_with_its_node(kind: int) -> None:
    data = tar(
        [
            (f"dev/{LONG}", tarfile.CHRTYPE, b""),
            (f"srv/{LONG}", tarfile.REGTYPE, b"kept"),
            (f"srv/dev/{LONG}x", tarfile.CHRTYPE, b""),
        ],
        kind,
    )
    assert [name for name, _ in without(data)] == [f"srv/{LONG}", f"srv/dev/{LONG}x"]


def test_a_tar_without_nodes_is_not_changed() -> None:
    data = tar([("a", tarfile.REGTYPE, b"1"), ("dev", tarfile.DIRTYPE, b"")])
    assert device_ranges(io.BytesIO(data)) == ()
    assert b"".join(kept(io.BytesIO(data), (), 7)) == data


def test_a_broken_header_is_named() -> None:
    data = bytearray(tar([("a", tarfile.REGTYPE, b"1")]))
    data[124:136] = b"no number 12"
    with pytest.raises(ImageError, match="the tar of the root file system cannot be read"):
        device_ranges(io.BytesIO(bytes(data)))
