"""Layers that lie are refused with the reason, and nothing outside of the target is touched."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.unpack import Bounds, Owners, Unpacked, unpack
from sandbox_kernel.image.unpack_attributes import Attributes
from sandbox_kernel.image.unpack_headers import TarReader
from sandbox_kernel.image.unpack_lowers import Lowers
from sandbox_kernel.image.unpack_tree import Tree
from sandbox_kernel.linux.tree_names import FOLDER_FLAGS, is_opaque, is_whiteout
from tests.fakes.tars import (
    END,
    base256,
    file,
    folder,
    gnu_long,
    hard_link,
    header,
    pax,
    picture,
    raw_pax,
    symlink,
)

Way = Callable[..., Unpacked]
XATTR = b"SCHILY.xattr."
IS_ROOT = os.geteuid() == 0
SMALL = Bounds(entries=20, total_bytes=1 << 20, depth=8, path_bytes=400, header_bytes=4096)


def without_process(data: bytes, target: Path, bounds: Bounds = SMALL) -> Unpacked:
    """Unpack without the wall of chroot(2), so that only the look-ups by descriptor hold."""
    target_fd = os.open(target, FOLDER_FLAGS)
    try:
        attributes = Attributes(Owners.REAL if IS_ROOT else Owners.RECORDED)
        tree = Tree(target_fd, attributes, bounds=bounds, lowers=Lowers(()), skip_devices=False)
        return tree.fill(TarReader(io.BytesIO(data).readinto, bounds))
    finally:
        os.close(target_fd)


def with_process(data: bytes, target: Path, bounds: Bounds = SMALL) -> Unpacked:
    return unpack(io.BytesIO(data), target, bounds=bounds)


@pytest.fixture(params=[without_process, with_process])
def way(request: pytest.FixtureRequest) -> Way:
    chosen: Way = request.param
    return chosen


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    return folder


@pytest.fixture
def layer(tmp_path: Path) -> Callable[..., Path]:
    """Unpack entries into a folder of that name, over the layers below."""

    def make(name: str, *entries: bytes, lowers: tuple[Path, ...] = ()) -> Path:
        path = tmp_path / name
        path.mkdir()
        unpack(io.BytesIO(b"".join(entries) + END), path, lowers=lowers)
        return path

    return make


def sparse_0(size: int, stored: int, map_: bytes) -> bytes:
    said = pax((b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.map", map_))
    return said + file("f", bytes(stored))


DEEP = "/".join("abcdefghi")
HOSTILE = {
    "absolute name": (file("/etc/passwd"), "'/etc/passwd' is refused: its name is absolute"),
    "name with ..": (file("../passwd"), r"its name climbs by '\.\.'"),
    "name with .. inside": (file("a/../../passwd"), "its name climbs"),
    "name of .. alone": (folder(".."), "its name climbs"),
    "name with a NUL": (pax((b"path", b"a\0b")) + file("f"), "NUL byte"),
    "empty name": (file(""), "its name is empty"),
    "file as root": (file("./"[:1]), "only a folder can be the root"),
    "absolute name in PAX": (pax((b"path", b"/abs")) + file("f"), "is absolute"),
    "absolute name in GNU": (gnu_long(b"L", b"/abs") + file("f"), "is absolute"),
    "absolute name by prefix": (file("x", prefix=b"/etc"), "is absolute"),
    "below an absolute link": (
        symlink("a", "OUTSIDE") + file("a/passwd", b"evil"),
        "'a', which should hold it, is no folder",
    ),
    "below a link inside": (
        folder("d") + symlink("a", "d") + file("a/x"),
        "'a', which should hold it, is no folder",
    ),
    "folder below a link": (symlink("a", "OUTSIDE") + folder("a/d/e"), "is no folder"),
    "link below a link": (symlink("a", "OUTSIDE") + symlink("a/l", "x"), "is no folder"),
    "whiteout below a link": (symlink("a", "OUTSIDE") + file("a/.wh.secret"), "is no folder"),
    "opaque below a link": (symlink("a", "OUTSIDE") + file("a/.wh..wh..opq"), "is no folder"),
    "below a file": (file("a") + file("a/x"), "'a', which should hold it, is no folder"),
    "link that climbs out": (symlink("a", "../outside"), "leads out of the image"),
    "link that climbs out deeper": (symlink("a/b", "c/../../../x"), "leads out of the image"),
    "link to nothing": (symlink("a", ""), "its link target is empty"),
    "hard link, absolute": (hard_link("a", "/etc/passwd"), "its link target is absolute"),
    "hard link with ..": (hard_link("a", "../outside/secret"), "its link target climbs"),
    "hard link by a link": (
        symlink("a", "OUTSIDE") + hard_link("b", "a/secret"),
        "'a', which should hold it, is no folder",
    ),
    "hard link to itself": (file("a") + hard_link("a", "a"), "a hard link to the root, to itself"),
    "hard link to below": (
        file("a/b") + hard_link("a", "a/b"),
        "a hard link to the root, to itself or to below itself",
    ),
    "hard link to a folder": (folder("d") + hard_link("a", "d"), "a hard link to the folder"),
    "hard link to nothing": (hard_link("a", "b"), "a file that is not there"),
    "hard link to the root": (hard_link("a", "."), "a hard link to the root"),
    "character device": (header("null", b"3"), "it is a device node"),
    "block device": (header("sda", b"4"), "it is a device node"),
    "bare whiteout": (file(".wh."), "a whiteout that names no file"),
    "bare whiteout below": (file("d/.wh."), "a whiteout that names no file"),
    "whiteout of .": (file("d/.wh.."), "a whiteout that names no file"),
    "whiteout of ..": (file("d/.wh..."), "a whiteout that names no file"),
    "whiteout of a whiteout": (file("d/.wh..wh.x"), "a whiteout that names no file"),
    "file below a whiteout": (file(".wh.a/b"), "lies below a whiteout"),
    "whiteout that is a link": (symlink(".wh.a", "b"), "it is a whiteout, but no file"),
    "whiteout that is a folder": (folder(".wh.a"), "it is a whiteout, but no file"),
    "whiteout below a file": (file("a") + file("a/.wh.x"), "'a', which should hold it"),
    "opaque by attribute": (
        pax((XATTR + b"user.overlay.opaque", b"y")) + folder("d"),
        "carries the attribute 'user.overlay.opaque'",
    ),
    "redirect": (pax((XATTR + b"trusted.overlay.redirect", b"/")) + folder("d"), "redirect'"),
    "metacopy": (pax((XATTR + b"trusted.overlay.metacopy", b"")) + file("f"), "metacopy'"),
    "nested overlay": (
        pax((XATTR + b"user.overlay.overlay.opaque", b"y")) + folder("d"), "overlay.overlay",
    ),
    "forged record": (
        pax((XATTR + b"user.sandbox-kernel.owner", b"0:0")) + file("f"), "sandbox-kernel.owner",
    ),
    "long attribute": (pax((XATTR + b"user." + b"x" * 300, b"")) + file("f"), "too long"),
    "entries": (b"".join(folder(f"d{n}") for n in range(21)), "more than 20 entries"),
    "said size": (header("f", size=1 << 32), "it has 4294967296 bytes"),
    "size in base-256": (header("f", size=base256(1 << 62, 12)), "it has 4611686018427387904"),
    "sizes together": (file("a", bytes(600_000)) + file("b", bytes(600_000)), "over 1048576 bytes|is too large"),
    "sparse sizes together": (sparse_0(900_000, 0, b"0,0") * 2, "over 1048576 bytes"),
    "long tail": (file("a") + END + bytes(2 << 20), "the layer is too large"),
    "long path": (pax((b"path", b"p/" * 201)) + file("f"), "longer than 400 bytes or 8 folders"),
    "deep path": (folder(DEEP), "longer than 400 bytes or 8 folders"),
    "deep link target": (hard_link("a", DEEP), "its link target is longer"),
    "long name": (pax((b"path", b"n" * 256)) + file("f"), "a part of more than 255 bytes"),
    "PAX header": (pax((b"comment", b"c" * 5000)) + file("f"), "a header of 5014 bytes"),
    "global header": (pax((b"comment", b"c" * 5000), kind=b"g"), "a header of 5014 bytes"),
    "GNU name": (gnu_long(b"L", b"n" * 5000), "a header of 5001 bytes"),
    "broken PAX length": (raw_pax(b"x path=a\n") + file("f"), "PAX record without a length"),
    "PAX length of 0": (raw_pax(b"0 path=a\n") + file("f"), "not LENGTH KEY=VALUE"),
    "PAX length too long": (raw_pax(b"99 path=a\n") + file("f"), "not LENGTH KEY=VALUE"),
    "PAX without =": (raw_pax(b"7 path\n") + file("f"), "not LENGTH KEY=VALUE"),
    "PAX size": (pax((b"size", b"-1")) + file("f"), "'-1' is no number"),
    "PAX uid": (pax((b"uid", b"1_0")) + file("f"), "'1_0' is no number"),
    "PAX time": (pax((b"mtime", b"1e9")) + file("f"), "'1e9' is no time"),
    "checksum": (header("f", checksum=b"000000\0 "), "checksum is wrong, or this is no tar"),
    "no tar": (b"#!/bin/sh\n".ljust(2048, b"x"), "header is broken"),
    "number": (header("f", size=b"12x"), "is no octal number"),
    "negative size": (header("f", size=base256(-1, 12)), "its size is negative"),
    "owner": (header("f", uid=base256(0xFFFFFFFF, 8)), "its owner is out of range"),
    "unknown type": (header("f", b"V"), "its type b'V' is unknown"),
    "sparse order": (sparse_0(900, 10, b"50,5,0,5"), "sparse file is not in order"),
    "sparse overlap": (sparse_0(900, 10, b"0,6,5,4"), "sparse file is not in order"),
    "sparse beyond": (sparse_0(900, 10, b"895,10"), "does not fit its size"),
    "sparse sum": (sparse_0(900, 10, b"0,9"), "does not fit its size"),
    "sparse odd": (sparse_0(900, 10, b"0"), "odd number of fields"),
    "sparse without size": (
        pax((b"GNU.sparse.map", b"0,10")) + file("f", bytes(10)), "without its real size",
    ),
    "sparse map cut off": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9")) + file("f", b"5\n"),
        "the map of a sparse file is cut off",
    ),
    "sparse map without end": (
        pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.realsize", b"9"))
        + file("f", b"9999\n" + b"1\n" * 5000),
        "the map of a sparse file is too long",
    ),
}  # fmt: skip
CUT = {
    "data": (header("f", size=700) + bytes(600), "cut off inside a file"),
    "header": (file("a") + header("f")[:100], "cut off inside a header"),
    "padding": (header("f", size=7) + bytes(7), "cut off inside an entry"),
    "extension": (pax((b"path", b"a")), "ends behind a PAX or GNU header"),
}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_text("secret")
    return folder


@pytest.mark.parametrize("case", HOSTILE, ids=list(HOSTILE))
def test_what_lies_is_refused_and_nothing_outside_changes(
    case: str, way: Way, target: Path, outside: Path
) -> None:
    data, reason = HOSTILE[case]
    if b"OUTSIDE" in data:
        data = aimed_at(data, outside)
    before = picture(outside)
    with pytest.raises(ImageError, match=reason) as caught:
        way(data + END, target)
    assert len(str(caught.value)) < 600
    assert str(caught.value).isprintable()
    assert picture(outside) == before
    assert sorted(os.listdir(outside.parent)) == ["outside", "target"]


def aimed_at(data: bytes, outside: Path) -> bytes:
    """Put a real folder in the place of OUTSIDE, whatever the length of its name."""
    start = data.index(b"OUTSIDE") - 157
    long = gnu_long(b"K", os.fsencode(outside))
    return data[:start] + long + data[start:]


@pytest.mark.parametrize("case", CUT, ids=list(CUT))
def test_what_is_cut_off_is_refused(case: str, way: Way, target: Path) -> None:
    data, reason = CUT[case]
    with pytest.raises(ImageError, match=reason):
        way(data, target)


def test_a_link_that_is_replaced_is_not_written_through(
    way: Way, target: Path, outside: Path
) -> None:
    entries = [
        symlink("a", "secret"),
        hard_link("b", "a"),
        file("a", b"new"),
        file("b", b"newer"),
        symlink("c", "OUTSIDE"),
        folder("c", 0o700),
        file("c/secret", b"ours"),
    ]
    way(aimed_at(b"".join(entries), outside) + END, target)
    assert (outside / "secret").read_text() == "secret"
    assert (target / "a").read_text() == "new"
    assert (target / "b").read_text() == "newer"
    assert not (target / "c").is_symlink()
    assert (target / "c/secret").read_text() == "ours"


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [
        (file("x", b"old", mode=0o600), file("x", b"new"), stat.S_IFREG),
        (folder("x") + file("x/y"), file("x", b"new"), stat.S_IFREG),
        (folder("x") + file("x/y"), symlink("x", "z"), stat.S_IFLNK),
        (file("x"), folder("x"), stat.S_IFDIR),
        (symlink("x", "z"), folder("x"), stat.S_IFDIR),
        (header("x", b"6"), file("x", b"new"), stat.S_IFREG),
        (file("z") + folder("x") + file("x/y"), hard_link("x", "z"), stat.S_IFREG),
    ],
)
def test_the_last_of_equal_names_counts(
    before: bytes, after: bytes, kind: int, way: Way, target: Path
) -> None:
    way(before + after + END, target)
    assert stat.S_IFMT((target / "x").lstat().st_mode) == kind
    assert not (target / "x" / "y").exists()


def test_a_folder_over_a_folder_gives_it_new_attributes(way: Way, target: Path) -> None:
    way(folder("x", 0o700) + file("x/y") + folder("x", 0o711, mtime=5) + END, target)
    seen = picture(target)
    assert (seen[b"x"].mode, seen[b"x"].mtime_ns) == (0o711, 5_000_000_000)
    assert b"x/y" in seen


@pytest.mark.parametrize("first", [True, False], ids=["whiteouts first", "whiteouts last"])
def test_whiteouts_are_of_the_layers_below_in_any_order(
    first: bool, way: Way, target: Path
) -> None:
    whiteouts = [file("d/.wh..wh..opq"), file(".wh.gone"), file(".wh.file"), file(".wh.folder")]
    entries = [folder("d"), file("d/new"), file("file", b"new"), folder("folder"), file("folder/x")]
    order = whiteouts + entries if first else entries + whiteouts
    way(b"".join(order) + END, target)
    assert is_whiteout((target / "gone").lstat())
    assert (target / "d/new").exists()
    assert (target / "file").read_text() == "new"
    assert (target / "folder/x").exists()
    for name, opaque in (("d", True), ("folder", True), (".", False)):
        fd = os.open(target / name, FOLDER_FLAGS)
        assert is_opaque(fd) == opaque, name
        os.close(fd)


def test_an_opaque_root_is_told(way: Way, target: Path) -> None:
    assert way(file(".wh..wh..opq") + file("a") + END, target).opaque_root
    assert not way(file("b/.wh..wh..opq") + END, target).opaque_root


def test_what_aufs_left_behind_is_skipped(way: Way, target: Path) -> None:
    way(
        folder(".wh..wh.plnk") + file(".wh..wh.plnk/1.2") + file(".wh..wh.aufs") + file("a") + END,
        target,
    )
    assert os.listdir(target) == ["a"]


def test_a_hard_link_is_the_same_file(way: Way, target: Path) -> None:
    way(file("d/a", b"x") + hard_link("b", "d/a") + hard_link("e/c", "./d//a") + END, target)
    assert picture(target)[b"b"].links == (b"b", b"d/a", b"e/c")


def test_a_hard_link_to_a_file_below_brings_the_file_up(layer: Callable[..., Path]) -> None:
    low = layer("low", folder("d", 0o711), file("d/f", b"low", mode=0o4751, mtime=7, uid=3))
    middle = layer("middle", file("other"))
    top = layer("top", hard_link("x/l", "d/f"), lowers=(low, middle))
    seen = picture(top)
    assert seen[b"x/l"].links == (b"d/f", b"x/l")
    assert (seen[b"d/f"].content, seen[b"d/f"].mode) == (b"low", 0o4751)
    assert seen[b"d/f"].owner == (3, 0)
    assert (seen[b"d/f"].mtime_ns, seen[b"d"].mode) == (7_000_000_000, 0o711)


@pytest.mark.parametrize(
    "middle",
    [
        (file("d/.wh.f"),),
        (file("d/.wh..wh..opq"),),
        (file(".wh.d"),),
        (file("d"),),
        (symlink("d", "e"), file("e/f")),
    ],
    ids=["whiteout", "opaque", "whiteout above", "file above", "link above"],
)
def test_a_hard_link_to_what_is_hidden_is_refused(
    middle: tuple[bytes, ...], layer: Callable[..., Path]
) -> None:
    low = layer("low", file("d/f", b"low"))
    hidden = layer("middle", *middle)
    with pytest.raises(ImageError, match="a hard link to a file that is not there"):
        layer("top", hard_link("l", "d/f"), lowers=(low, hidden))


def test_folders_without_an_entry_are_as_below(layer: Callable[..., Path], target: Path) -> None:
    entries = file("d/e/f") + END
    low = layer("low", folder("d", 0o1750, mtime=9, gid=4), file("d/e"))
    assert unpack(io.BytesIO(entries), target, lowers=[low]).needs_lowers
    seen = picture(target)
    assert (seen[b"d"].mode, seen[b"d"].owner, seen[b"d"].mtime_ns) == (
        0o1750,
        (0, 4),
        9_000_000_000,
    )
    assert (seen[b"d/e"].mode, seen[b"d/e"].mtime_ns) == (0o755, 0)


def test_a_layer_that_says_all_needs_no_layers_below(way: Way, target: Path) -> None:
    said = way(folder("d") + file("d/f", b"123") + hard_link("l", "d/f") + END, target)
    assert said == Unpacked(entries=3, bytes=3)


def test_owner_and_set_id_bits_are_kept_or_recorded(target: Path) -> None:
    entries = (
        file("tool", b"x", mode=0o6755, uid=12, gid=34)
        + folder("shared", 0o2775, gid=34)
        + folder("tmp", 0o1777)
        + file("plain", mode=0o640)
    )
    unpack(io.BytesIO(entries + END), target, owners=Owners.RECORDED)
    on_disk = (target / "tool").stat()
    assert on_disk.st_uid == os.geteuid()
    assert stat.S_IMODE(on_disk.st_mode) == 0o755
    assert os.listxattr(target / "plain") == []
    seen = picture(target)
    assert (seen[b"tool"].mode, seen[b"tool"].owner) == (0o6755, (12, 34))
    assert (seen[b"shared"].mode, seen[b"shared"].owner) == (0o2775, (0, 34))
    assert seen[b"tmp"].mode == 0o1777


@pytest.mark.skipif(not IS_ROOT, reason="only root gives files away")
def test_root_gives_files_their_real_owner(target: Path) -> None:
    unpack(io.BytesIO(file("tool", mode=0o4755, uid=12, gid=34) + symlink("l", "x") + END), target)
    info = (target / "tool").stat()
    assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode)) == (12, 34, 0o4755)


@pytest.mark.skipif(not IS_ROOT, reason="only root may set them")
def test_root_keeps_file_capabilities(way: Way, target: Path) -> None:
    value = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw, version 2
    said = pax((XATTR + b"security.capability", value)) + file("ping", uid=1)
    assert way(said + END, target).dropped_xattrs == 0
    assert os.getxattr(target / "ping", "security.capability") == value
    broken = pax((XATTR + b"security.capability", b"nonsense")) + file("ping")
    with pytest.raises(ImageError, match=r"'security\.capability' cannot be set: Invalid argument"):
        way(broken + END, target)


def test_attributes_of_users_are_kept_and_others_counted(way: Way, target: Path) -> None:
    others = ((XATTR + b"system.posix_acl_access", b"\2"), (XATTR + b"security.selinux", b"s"))
    entries = (
        pax((XATTR + b"user.note", b"line\n\0\xff="), *others)
        + file("f")
        + pax((XATTR + b"user.note", b""))
        + folder("d")
        + pax((XATTR + b"user.note", b"x"))
        + symlink("l", "f")
    )
    assert way(entries + END, target).dropped_xattrs == 3
    assert picture(target)[b"f"].xattrs == (("user.note", b"line\n\0\xff="),)
    assert picture(target)[b"d"].xattrs == (("user.note", b""),)


def test_devices_are_left_out_if_asked(target: Path) -> None:
    data = header("dev/null", b"3") + header("dev/sda", b"4") + file("a") + END
    assert unpack(io.BytesIO(data), target, skip_devices=True).skipped_devices == 2
    assert os.listdir(target) == ["a"]


def test_names_of_any_bytes_and_length(way: Way, target: Path) -> None:
    long = b"l" * 200
    entries = (
        file(b"caf\xe9", b"latin")
        + gnu_long(b"L", b"gnu/" + long)
        + file("gnu", b"1")
        + gnu_long(b"K", long)
        + gnu_long(b"L", b"link" + long)
        + symlink("x", "y")
        + pax((b"path", b"pax/\xff" + long), (b"mtime", b"-1.5"), (b"hdrcharset", b"BINARY"))
        + file("f", b"2")
        + file("short", b"3", prefix=b"pre/fix")
        + file("gnu-prefix", b"4", prefix=b"\1\2", magic=b"ustar  \0")
        + header("v7/", b"\0", magic=b"", mode=0o700)
        + pax((b"path", b"not this")) + pax((b"path", b""), (b"size", b"")) + file("back", b"5")
        + pax((b"path", b"everybody"), kind=b"g")
        + file("after", mtime=base256(1 << 40, 12))
    )  # fmt: skip
    way(entries + END, target, Bounds())
    seen = picture(target)
    assert {path: one.content for path, one in seen.items() if one.content} == {
        b"caf\xe9": b"latin",
        b"gnu/" + long: b"1",
        b"link" + long: long,
        b"pax/\xff" + long: b"2",
        b"pre/fix/short": b"3",
        b"gnu-prefix": b"4",
        b"back": b"5",
    }
    assert seen[b"pax/\xff" + long].mtime_ns == -1_500_000_000
    assert seen[b"v7"].mode == 0o700
    assert b"after" in seen


def test_modes_that_keep_the_owner_out_do_not_stop_it(way: Way, target: Path) -> None:
    entries = (
        folder("d", 0) + folder("d/e", 0o555) + file("d/e/f", b"x", mode=0) + file("d/e/.wh.g")
    )
    way(entries + END, target)
    assert stat.S_IMODE((target / "d").stat().st_mode) == 0
    (target / "d").chmod(0o700)
    assert stat.S_IMODE((target / "d/e").stat().st_mode) == 0o555
    assert sorted(os.listdir(target / "d/e")) == ["f", "g"]
    (target / "d/e").chmod(0o700)


def test_many_folders_take_few_descriptors(way: Way, target: Path) -> None:
    names = [f"d{n}/e/f" for n in range(500)]
    entries = b"".join(folder(f"d{n}") + folder(f"d{n}/e") for n in range(500))
    links = b"".join(hard_link(f"d{n}/l", f"d{499 - n}/e/f") for n in range(500))
    data = entries + b"".join(file(name) for name in names) + links + END
    assert way(data, target, Bounds()).entries == 2000
    assert len(os.listdir(target)) == 500


def test_errors_of_the_stream_pass_through(target: Path) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 1024:
                raise ImageError("the digest is wrong")
            return super().read(512)

    with pytest.raises(ImageError, match="the digest is wrong"):
        unpack(Broken(file("a", bytes(5000))), target)


def test_the_stream_is_read_to_its_end(target: Path) -> None:
    stream = io.BytesIO(file("a") + END + b"behind the end" * 1000)
    unpack(stream, target)
    assert stream.read() == b""


def test_a_target_that_is_a_link_is_refused(tmp_path: Path, target: Path) -> None:
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ImageError, match="link cannot be opened"):
        unpack(io.BytesIO(END), tmp_path / "link")


def test_memory_is_bounded(target: Path) -> None:
    names = b"".join(file(f".wh.{n:095}") for n in range(150_000))
    with pytest.raises(ImageError, match="the layer has too many names to unpack it"):
        unpack(io.BytesIO(names + END), target, bounds=Bounds(memory_bytes=40 << 20))


@pytest.mark.skipif(
    not IS_ROOT, reason="an ordinary user has a user namespace for it, or does without"
)
def test_root_does_not_unpack_without_chroot(target: Path) -> None:
    program = (
        "import io, sys; from sandbox_kernel.linux import libc;"
        "from sandbox_kernel.image.unpack import unpack;"
        "libc.drop_bounding(n for n in range(64) if n != libc.CAP_SYS_CHROOT);"
        "unpack(io.BytesIO(bytes(1024)), sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(target)],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "root must not unpack without chroot(2)" in done.stderr
