"""The tar of a tree: equal trees give equal bytes, and what comes out of it is the tree."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import socket
import stat
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.unpack import Bounds, Owners
from sandbox_kernel.image.unpack_attributes import Attributes
from sandbox_kernel.image.unpack_headers import TarReader
from sandbox_kernel.image.unpack_lowers import Lowers, copy_attributes
from sandbox_kernel.image.unpack_tree import Tree
from sandbox_kernel.linux.tree_names import FOLDER_FLAGS, OPAQUE, is_opaque, is_whiteout
from sandbox_kernel.linux.tree_tar import Packed, Packing, pack
from tests.fakes.tars import Seen, picture

IS_ROOT = os.geteuid() == 0
EPOCH_S = 1_500_000_000
OWNER = None if IS_ROOT else (0, 0)
PACKING = Packing(epoch_s=EPOCH_S, owner=OWNER)


def packed(folder: Path, packing: Packing = PACKING) -> bytes:
    out = io.BytesIO()
    pack(folder, out, packing)
    return out.getvalue()


def unpacked(data: bytes, target: Path) -> Path:
    target.mkdir()
    fd = os.open(target, FOLDER_FLAGS)
    try:
        attributes = Attributes(Owners.REAL if IS_ROOT else Owners.RECORDED)
        tree = Tree(fd, attributes, bounds=Bounds(), lowers=Lowers(()), skip_devices=False)
        said = tree.fill(TarReader(io.BytesIO(data).readinto, Bounds()))
    finally:
        os.close(fd)
    assert not said.needs_lowers
    return target


class Node(NamedTuple):
    """A file of a random tree; `twin` is another name of it."""

    kind: str
    mode: int
    content: bytes
    mtime_s: int
    xattr: bytes | None
    owner: tuple[int, int]
    twin: bytes | None = None


Model = dict[bytes, Node]
"""Paths, folders among them, each below one that is there."""

NAMES = st.sampled_from([b"a", b"b", b"c", b"\xff\xfe", b"new\nline", b"l" * 120])
MODES = st.integers(0, 0o7777)


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    kind = draw(st.sampled_from(["file", "file", "folder", "folder", "folder", "link", "fifo"]))
    mode = draw(MODES) | (0o700 if kind == "folder" else 0o600)
    content = b""
    if kind == "file":
        content = draw(st.binary(max_size=20)) * draw(st.sampled_from([0, 1, 60]))
    elif kind == "link":
        content = draw(st.sampled_from([b"a", b"/etc/passwd", b"x" * 150]))
    xattr = draw(st.none() | st.binary(max_size=12)) if kind in {"file", "folder"} else None
    owner = (draw(st.sampled_from([0, 7, 3_000_000])), 0) if IS_ROOT else (0, 0)
    return Node(kind, mode, content, draw(st.integers(0, EPOCH_S)), xattr, owner)


@st.composite
def models(draw: st.DrawFn) -> Model:
    """Draw a tree: each path is put below a folder that was drawn before it."""
    model: Model = {}
    for _ in range(draw(st.integers(0, 12))):
        folders = [b"", *(path for path, node in model.items() if node.kind == "folder")]
        above = draw(st.sampled_from(folders))
        path = above + (b"/" if above else b"") + draw(NAMES)
        if path not in model and path.count(b"/") < 4:
            model[path] = draw(nodes())
            files = [one for one, node in model.items() if node.kind == "file" and not node.twin]
            if model[path].kind == "file" and len(files) > 1 and draw(st.booleans()):
                model[path] = model[files[0]]._replace(twin=files[0])
    return model


def build(model: Model, root: Path) -> Path:
    root.mkdir(mode=0o755)
    for path, node in model.items():
        if node.kind == "folder":
            os.mkdir(os.fsencode(root) + b"/" + path)
        else:
            write(node, os.fsencode(root) + b"/", path)
    finish(model, root)
    return root


def write(node: Node, top: bytes, path: bytes) -> None:
    if node.twin:
        os.link(top + node.twin, top + path)
    elif node.kind == "file":
        Path(os.fsdecode(top + path)).write_bytes(node.content)
    elif node.kind == "link":
        os.symlink(node.content, top + path)
    else:
        os.mkfifo(top + path)


def finish(model: Model, root: Path) -> None:
    """Set attributes, of what is below first; a path that is not there is left out."""
    top = os.fsencode(root) + b"/"
    for path, node in reversed(list(model.items())):
        if not os.path.lexists(top + path):
            continue
        if IS_ROOT:
            os.chown(top + path, *node.owner, follow_symlinks=False)
        if node.xattr is not None:
            os.setxattr(top + path, b"user.note", node.xattr)
        if node.kind != "link":
            os.chmod(top + path, node.mode)
        ns = node.mtime_s * 1_000_000_000
        os.utime(top + path, ns=(ns, ns), follow_symlinks=False)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Give a root as images have it, of which a tar says nothing."""
    folder = tmp_path / "tree"
    folder.mkdir()
    folder.chmod(0o755)
    return folder


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def without_root(seen: dict[bytes, Seen]) -> dict[bytes, Seen]:
    return {path: one for path, one in seen.items() if path}


@settings(deadline=None, max_examples=150)
@given(models())
def test_what_was_packed_comes_out_the_same(model: Model) -> None:
    with scratch() as at:
        tree = build(model, at / "tree")
        data = packed(tree)
        copy = unpacked(data, at / "copy")
        assert without_root(picture(copy)) == without_root(picture(tree))
        assert packed(copy) == data


@settings(deadline=None, max_examples=150)
@given(models(), models())
def test_a_difference_that_is_applied_gives_the_other_tree(before: Model, after: Model) -> None:
    with scratch() as at:
        lower = build(before, at / "lower")
        upper = difference(before, after, at / "upper")
        layer = unpacked(packed(upper), at / "layer")
        merge(layer, lower, at / "merged")
        wanted = build(after, at / "after")
        assert shown(at / "merged") == shown(wanted)


def difference(before: Model, after: Model, upper: Path) -> Path:
    """Make what overlayfs has in its upper when one tree was changed into the other."""
    upper.mkdir(mode=0o755)
    top = os.fsencode(upper) + b"/"
    groups = {node.twin for node in after.values() if node.twin}
    for path, node in after.items():
        old = before.get(path)
        same = old == node and path not in groups and not node.twin
        if node.kind == "folder":
            os.mkdir(top + path)
            if old is not None and old.kind == "folder":
                if len(path) % 2:  # both ways of saying it
                    os.setxattr(top + path, OPAQUE, b"y")
            elif old is not None:
                os.setxattr(top + path, OPAQUE, b"y")
        elif not same or hidden_above(path, upper):
            write(node, top, path)
    for path in before:
        above = path.rpartition(b"/")[0]
        is_there = not above or (above in after and after[above].kind == "folder")
        if path not in after and is_there and not hidden_above(path, upper):
            os.mknod(top + path, stat.S_IFCHR, os.makedev(0, 0))
    finish(after, upper)
    return upper


def hidden_above(path: bytes, upper: Path) -> bool:
    top = os.fsencode(upper) + b"/"
    parts = path.split(b"/")[:-1]
    above = [b"/".join(parts[: n + 1]) for n in range(len(parts))]
    return any(os.listxattr(top + one) and has_opaque(top + one) for one in above)


def has_opaque(path: bytes) -> bool:
    return os.fsdecode(OPAQUE) in os.listxattr(path)


def merge(upper: Path | None, lower: Path | None, merged: Path) -> None:
    """Put one folder over another as overlayfs would show them; files are linked."""
    merged.mkdir()
    above = set(os.listdir(upper)) if upper else set()
    below = set(os.listdir(lower)) if lower else set()
    for name in above | below:
        top = upper / name if upper and name in above else None
        bottom = lower / name if lower and name in below else None
        if top and is_whiteout(top.lstat()):
            continue
        first = top or bottom
        assert first
        if not stat.S_ISDIR(first.lstat().st_mode):
            os.link(first, merged / name, follow_symlinks=False)
        elif first is bottom or not bottom or not stat.S_ISDIR(bottom.lstat().st_mode):
            merge(first, None, merged / name)
        else:
            merge(first, None if marked_opaque(first) else bottom, merged / name)
    with opened(upper or lower) as source, opened(merged) as copy:
        copy_attributes(source, copy)


@contextlib.contextmanager
def opened(folder: Path | None) -> Iterator[int]:
    assert folder
    fd = os.open(folder, FOLDER_FLAGS)
    yield fd
    os.close(fd)


def marked_opaque(folder: Path) -> bool:
    with opened(folder) as fd:
        return is_opaque(fd)


def shown(root: Path) -> dict[bytes, Seen]:
    """Give the picture as a user of the overlay has it, who does not see opaque marks."""
    mark = os.fsdecode(OPAQUE)
    return {
        path: one._replace(xattrs=tuple(pair for pair in one.xattrs if pair[0] != mark))
        for path, one in picture(root).items()
        if path
    }


def sample(root: Path, order: list[str], time_s: int) -> Path:
    """Make a tree whose files come in this order and have this time."""
    root.mkdir()
    for name in order:
        (root / name).mkdir(mode=0o750)
        (root / name / "file").write_text(name * 1000)
        os.link(root / name / "file", root / name / "again")
        (root / name / "link").symlink_to("file")
        os.setxattr(root / name / "file", b"user.b", b"2")
        os.setxattr(root / name / "file", b"user.a", b"1")
    for at, folders, files in os.walk(root):
        for name in [*folders, *files]:
            os.utime(Path(at, name), (time_s, time_s + 0.5), follow_symlinks=False)
    return root


def test_equal_trees_give_equal_bytes(tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(20)]
    mixed = random.Random(1).sample(names, len(names))
    one = sample(tmp_path / "one", names, EPOCH_S + 10)
    two = sample(tmp_path / "two", mixed, EPOCH_S + 1_000_000)
    for name in mixed:  # the other name first in the list of inodes
        (two / name / "file").unlink()
        os.link(two / name / "again", two / name / "file")
    assert packed(one) == packed(two)


@pytest.mark.skipif(not IS_ROOT, reason="needs files of another user")
def test_equal_trees_of_other_users_give_equal_bytes(tmp_path: Path) -> None:
    one = sample(tmp_path / "one", ["a", "b"], EPOCH_S + 10)
    two = sample(tmp_path / "two", ["a", "b"], EPOCH_S + 10)
    for at, folders, files in os.walk(two):
        for name in [*folders, *files]:
            os.chown(Path(at, name), 1234, 1234, follow_symlinks=False)
    packing = Packing(epoch_s=EPOCH_S, owner=(0, 0))
    assert packed(one, packing) == packed(two, packing)


def test_bytes_of_a_tree_stay_what_they_are(tree: Path) -> None:
    """The digest is part of what users see: change it with a reason only."""
    (tree / "file").write_text("text")
    (tree / "file").chmod(0o644)
    data = packed(tree)
    assert data == (
        b"file".ljust(100, b"\0")
        + b"0000644\0" + b"0000000\0" + b"0000000\0" + b"00000000004\0" + b"13132027400\0"
        + b"010070\0 " + b"0" + bytes(100) + b"ustar\00000" + bytes(64)
        + b"0000000\0" * 2 + bytes(167) + b"text".ljust(512, b"\0") + bytes(1024)
    )  # fmt: skip


def test_times_are_clamped_not_set(tree: Path) -> None:
    for name, time_s in (("old", 7), ("new", EPOCH_S + 7), ("ancient", -7)):
        (tree / name).write_text("")
        os.utime(tree / name, (time_s, time_s))
    with tarfile.open(fileobj=io.BytesIO(packed(tree))) as archive:
        times = {one.name: one.mtime for one in archive}
    assert times == {"old": 7, "new": EPOCH_S, "ancient": 0}


def test_whiteouts_come_before_what_is_new(tree: Path) -> None:
    (tree / "d").mkdir()
    os.setxattr(tree / "d", OPAQUE, b"y")
    for name in ("d/a", "b"):
        (tree / name).write_text("")
    for name in ("a", "z"):
        os.mknod(tree / name, stat.S_IFCHR, os.makedev(0, 0))
    with tarfile.open(fileobj=io.BytesIO(packed(tree))) as archive:
        assert archive.getnames() == [".wh.a", ".wh.z", "b", "d", "d/.wh..wh..opq", "d/a"]
        assert {(one.mtime, one.mode, one.uid) for one in archive if ".wh." in one.name} == {
            (EPOCH_S, 0, 0)
        }


def test_sockets_are_left_out(tree: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(tree):
        listener.bind("socket")
    (tree / "a").write_text("")
    out = io.BytesIO()
    assert pack(tree, out, PACKING) == Packed(entries=1, bytes=0, skipped_sockets=1)


def test_an_open_folder_can_be_packed_twice(tree: Path) -> None:
    (tree / "a").write_text("text")
    fd = os.open(tree, FOLDER_FLAGS)
    one, two = io.BytesIO(), io.BytesIO()
    pack(fd, one, PACKING)
    pack(fd, two, PACKING)
    os.close(fd)
    assert one.getvalue() == two.getvalue() == packed(tree)


def test_other_tools_read_long_names_and_large_numbers(tree: Path) -> None:
    name = "d" * 120 + "/" + "e" * 120
    (tree / name).mkdir(parents=True)
    (tree / name / "ff").symlink_to("t" * 140)
    short = "p" * 90 + "/" + "q" * 90
    (tree / short).mkdir(parents=True)
    data = packed(tree, Packing(epoch_s=EPOCH_S, owner=(3_000_000, 5)))
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        link = archive.getmember(name + "/ff")
        assert (link.linkname, link.uid, link.gid) == ("t" * 140, 3_000_000, 5)
        # ustar splits what it can, so this one needs no PAX record of its path.
        assert "path" not in archive.getmember(short).pax_headers


def device(folder: Path) -> None:
    if not IS_ROOT:
        pytest.skip("only root can make one")
    os.mknod(folder / "bad", stat.S_IFCHR, os.makedev(1, 3))


def whiteout_name(folder: Path) -> None:
    (folder / ".wh.bad").write_text("")


def elsewhere(folder: Path) -> None:
    (folder / "bad").write_text("")
    os.setxattr(folder / "bad", b"user.overlay.metacopy", b"")


def forged(folder: Path) -> None:
    (folder / "bad").write_text("")
    os.setxattr(folder / "bad", b"user.sandbox-kernel.owner", b"-1:0")


def odd_attribute(folder: Path) -> None:
    (folder / "bad").write_text("")
    os.setxattr(folder / "bad", b"user.a=b", b"")


def large(folder: Path) -> None:
    (folder / "bad").write_text("")
    os.truncate(folder / "bad", 1 << 40)


def deep(folder: Path) -> None:
    folder_fd = os.open(folder, FOLDER_FLAGS)
    for _ in range(300):
        os.mkdir("bad", dir_fd=folder_fd)
        below = os.open("bad", FOLDER_FLAGS, dir_fd=folder_fd)
        os.close(folder_fd)
        folder_fd = below
    os.close(folder_fd)


def many(folder: Path) -> None:
    for number in range(120):
        (folder / f"bad{number}").write_text("")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (device, "it is a device node"),
        (whiteout_name, r"names that begin with \.wh\."),
        (elsewhere, r"its data is in another layer \(user.overlay.metacopy\)"),
        (forged, "its recorded owner b'-1:0' is no UID:GID"),
        (odd_attribute, "has a = in it"),
        (large, "the files have more than 1048576 bytes together"),
        (deep, "it is more than 256 folders deep"),
        (many, "the layer has more than 100 entries"),
    ],
)
def test_what_a_layer_cannot_hold_is_named(make, reason: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "tree"
    folder.mkdir()
    make(folder)
    packing = Packing(epoch_s=0, total_bytes=1 << 20, entries=1000 if make is deep else 100)
    with pytest.raises(ImageError, match=f"bad.*cannot be in a layer: .*{reason}"):
        packed(folder, packing)
    shutil.rmtree(folder)


def test_links_are_not_followed(tmp_path: Path, tree: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tree / "file").symlink_to(tmp_path / "secret")
    (tree / "folder").symlink_to(tmp_path)
    os.mkfifo(tree / "fifo")  # nobody writes, so whoever opens it waits for ever
    data = packed(tree)
    assert data.count(b"secret") == data.count(os.fsencode(tmp_path / "secret")) == 1
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert archive.getnames() == ["fifo", "file", "folder"]
