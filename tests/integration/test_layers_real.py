"""Layers of other tools, and ours in their hands: GNU tar, umoci, skopeo, the kernel's overlay."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from sandbox_kernel.image.compression import open_decompressed
from sandbox_kernel.image.gzip_writer import GzipWriter
from sandbox_kernel.image.unpack import unpack
from sandbox_kernel.linux.tree_names import OPAQUE
from sandbox_kernel.linux.tree_tar import Packing, pack
from tests.fakes.tars import Seen, picture

IS_ROOT = os.geteuid() == 0
EPOCH_S = 1_700_000_000
PACKING = Packing(epoch_s=EPOCH_S, owner=None if IS_ROOT else (0, 0))


def run(*argv: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(
        [str(one) for one in argv], capture_output=True, text=True, check=False, cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a tree with one of everything."""
    root = tmp_path / "tree"
    (root / "deep" / ("d" * 120) / ("e" * 120)).mkdir(parents=True)
    (root / "deep" / ("d" * 120) / ("e" * 120) / "file").write_text("deep")
    (root / "plain").write_bytes(b"plain\n" * 1000)
    (root / "tool").write_text("#!/bin/sh\n")
    (root / "tool").chmod(0o4755)
    os.link(root / "plain", root / "deep" / "twin")
    (root / "link").symlink_to("plain")
    (root / "far").symlink_to("/" + "t" * 150)
    os.mkfifo(root / "fifo")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9\n")).write_text("latin")
    (root / "empty").mkdir(mode=0o1777)
    os.setxattr(root / "plain", "user.note", b"line\n\0")
    with (root / "holes").open("wb") as holes:
        for number in range(30):
            holes.seek(number * 200_000)
            holes.write(b"%d" % number * 5000)
        holes.truncate(10_000_000)
    for number, (at, folders, files) in enumerate(os.walk(root, topdown=False)):
        for name in [*folders, *files]:
            ns = (1_000_000_000 + number) * 1_000_000_000
            os.utime(Path(at, name), ns=(ns, ns), follow_symlinks=False)
    root.chmod(0o755)
    return root


def seen(root: Path, *, xattrs: bool = True) -> dict[bytes, Seen]:
    """Give the picture without the root; without owners, where a user cannot have others."""
    return {
        path: one._replace(
            owner=one.owner if IS_ROOT else (0, 0), xattrs=one.xattrs if xattrs else ()
        )
        for path, one in picture(root).items()
        if path
    }


FORMATS = {
    "pax": ["--format=pax", "--xattrs", "--pax-option=delete=atime,delete=ctime"],
    "gnu": ["--format=gnu"],
    "oldgnu": ["--format=oldgnu"],
    "pax, sparse 0.0": ["--format=pax", "--sparse", "--sparse-version=0.0"],
    "pax, sparse 0.1": ["--format=pax", "--sparse", "--sparse-version=0.1"],
    "pax, sparse 1.0": ["--format=pax", "--sparse", "--sparse-version=1.0"],
    "gnu, sparse": ["--format=gnu", "--sparse"],
    "pax, global": ["--format=pax", "--pax-option=globexthdr.name=g,comment=of all"],
}


@pytest.mark.programs("tar")
@pytest.mark.parametrize("name", FORMATS)
def test_what_gnu_tar_writes_comes_out_right(name: str, tree: Path, tmp_path: Path) -> None:
    archive, target = tmp_path / "a.tar", tmp_path / "target"
    target.mkdir()
    run("tar", *FORMATS[name], "-cf", archive, "-C", tree, ".")
    with archive.open("rb") as stream:
        unpack(stream, target)
    xattrs = name == "pax"
    wanted = seen(tree, xattrs=xattrs)
    if IS_ROOT:
        assert seen(target, xattrs=xattrs) == wanted
    else:  # he wrote his own id, which is one to record
        owner = (os.getuid(), os.getgid())
        got = picture(target)
        assert got[b"plain"].owner == owner
        assert seen(target, xattrs=xattrs) == wanted
    if "sparse" in name:
        assert (target / "holes").stat().st_blocks * 512 < 5_000_000


@pytest.mark.programs("tar")
@pytest.mark.parametrize("old", ["ustar", "v7"])
def test_old_formats_come_out_right(old: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / ("p" * 60) / ("q" * 30)).mkdir(parents=True)
    target.mkdir()
    (source / "file").write_text("x" * 700)
    run("tar", f"--format={old}", "-cf", tmp_path / "a.tar", "-C", source, ".")
    with (tmp_path / "a.tar").open("rb") as stream:
        unpack(stream, target)
    times = {path: one.mtime_ns // 1_000_000_000 for path, one in seen(source).items()}
    assert {path: one.mtime_ns // 1_000_000_000 for path, one in seen(target).items()} == times
    assert (target / "file").read_text() == "x" * 700


@pytest.mark.programs("tar")
def test_gnu_tar_reads_what_we_write(tree: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with (tmp_path / "a.tar").open("wb") as out:
        pack(tree, out, PACKING)
    options = ["--xattrs", "--preserve-permissions"]
    run("tar", *options, "-xf", tmp_path / "a.tar", "-C", target)
    assert seen(target) == seen(tree)


def write_layout(layers: list[bytes], layout: Path) -> None:
    """Write an OCI layout by hand: layers of gzip, the lowest first, as image `test`."""
    (layout / "blobs/sha256").mkdir(parents=True)

    def blob(data: bytes, media_type: str) -> dict[str, object]:
        name = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / name).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{name}", "size": len(data)}

    kind = "application/vnd.oci.image."
    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    config = {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "config": {},
        "history": [{"created_by": "test"} for _ in layers],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind + "manifest.v1+json",
        "config": blob(json.dumps(config).encode(), kind + "config.v1+json"),
        "layers": [blob(compressed(one), kind + "layer.v1.tar+gzip") for one in layers],
    }
    entry = blob(json.dumps(manifest).encode(), kind + "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "test"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')


def compressed(data: bytes) -> bytes:
    out = io.BytesIO()
    with GzipWriter(out) as writer:
        writer.write(data)
    return out.getvalue()


def packed(folder: Path) -> bytes:
    out = io.BytesIO()
    pack(folder, out, PACKING)
    return out.getvalue()


@pytest.fixture
def upper(tmp_path: Path) -> Path:
    """Make a second layer for `tree`, with all that overlayfs has in an upper."""
    root = tmp_path / "upper"
    (root / "deep").mkdir(parents=True)
    (root / "deep").chmod(0o700)
    os.setxattr(root / "deep", OPAQUE, b"y")
    (root / "deep" / "new").write_text("new")
    (root / "empty").write_text("a file where a folder was")
    (root / "plain").mkdir()
    (root / "plain" / "inside").write_text("a folder where a file was")
    for name in ("tool", "link"):
        os.mknod(root / name, stat.S_IFCHR, os.makedev(0, 0))
    for at, folders, files in os.walk(root, topdown=False):
        for name in [*folders, *files]:
            os.utime(Path(at, name), (EPOCH_S - 5, EPOCH_S - 5))
    root.chmod(0o755)
    return root


@functools.cache
def overlay_problem() -> str:
    """Say why no overlay can be mounted here, or nothing."""
    script = "mkdir a b c && mount -t overlay o -o lowerdir=a:b,userxattr c"
    done = subprocess.run(
        ["sh", "-c", f'd=$(mktemp -d) && cd "$d" && exec unshare {_unshare()} sh -c "{script}"'],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stderr


def _unshare() -> str:
    return "--mount" if IS_ROOT else "--user --map-root-user --mount"


def overlaid(layers: list[Path], at: Path) -> Path:
    """Copy what the kernel shows of these layers, the lowest first, into a new folder."""
    if why := overlay_problem():
        pytest.skip(f"no overlay here: {why}")
    (at / "mount").mkdir()
    (at / "merged").mkdir()
    lowers = ":".join(str(one) for one in reversed(layers))
    script = (
        f"mount -t overlay o -o lowerdir={lowers},userxattr {at}/mount &&"
        f"cp -a --no-preserve=links {at}/mount/. {at}/merged/"
    )
    run("unshare", *_unshare().split(), "sh", "-c", script)
    return at / "merged"


def unpacked(data: bytes, target: Path, lowers: list[Path] | None = None) -> Path:
    target.mkdir()
    unpack(io.BytesIO(data), target, lowers=lowers or [])
    return target


def contents(root: Path) -> dict[bytes, tuple[int, int, bytes, int]]:
    return {
        path: (one.kind, one.mode, one.content, one.mtime_ns // 1_000_000_000)
        for path, one in seen(root).items()
    }


def rootless() -> list[str]:
    return [] if IS_ROOT else ["--rootless"]


@pytest.mark.programs("umoci")
def test_umoci_sees_in_our_layers_what_overlayfs_shows(
    tree: Path, upper: Path, tmp_path: Path
) -> None:
    (tree / "fifo").unlink()  # umoci as an ordinary user leaves FIFOs out
    layers = [packed(tree), packed(upper)]
    write_layout(layers, tmp_path / "layout")
    run(
        "umoci",
        "raw",
        "unpack",
        *rootless(),
        "--image",
        tmp_path / "layout:test",
        tmp_path / "umoci",
    )
    ours = [unpacked(data, tmp_path / f"layer{n}") for n, data in enumerate(layers)]
    assert contents(overlaid(ours, tmp_path)) == contents(tmp_path / "umoci")


@pytest.mark.programs("umoci")
def test_layers_that_umoci_made_show_what_it_packed(tree: Path, tmp_path: Path) -> None:
    (tree / "fifo").unlink()
    write_layout([packed(tree)], tmp_path / "layout")
    image = f"{tmp_path}/layout:test"
    bundle = tmp_path / "bundle"
    run("umoci", "unpack", *rootless(), "--image", image, bundle)
    rootfs = bundle / "rootfs"
    shutil.rmtree(rootfs / "deep")
    (rootfs / "tool").unlink()
    (rootfs / "link").unlink()
    (rootfs / "link").write_text("a file where a link was")
    (rootfs / "new").mkdir()
    (rootfs / "new" / ("n" * 120)).write_text("new")
    for path in (rootfs / "link", rootfs / "new" / ("n" * 120), rootfs / "new"):
        os.utime(path, (EPOCH_S, EPOCH_S))  # umoci rounds, it does not cut
    run("umoci", "repack", "--image", image, bundle)
    lowers: list[Path] = []
    for number, data in enumerate(layers_of(tmp_path / "layout")):
        lowers.append(unpacked(data, tmp_path / f"layer{number}", lowers))
    assert len(lowers) == 2
    assert contents(overlaid(lowers, tmp_path)) == contents(rootfs)


def layers_of(layout: Path) -> list[bytes]:
    def blob(digest: str) -> bytes:
        return (layout / "blobs/sha256" / digest.partition(":")[2]).read_bytes()

    index = json.loads((layout / "index.json").read_bytes())
    manifest = json.loads(blob(index["manifests"][-1]["digest"]))
    return [content(blob(layer["digest"])) for layer in manifest["layers"]]


def content(data: bytes) -> bytes:
    reader = open_decompressed(io.BytesIO(data))
    return b"".join(iter(lambda: reader.read(1 << 20), b""))


@pytest.mark.programs("skopeo")
@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_layers_that_skopeo_compressed_are_the_same(
    compression: str, tree: Path, upper: Path, tmp_path: Path
) -> None:
    layers = [packed(tree), packed(upper)]
    write_layout(layers, tmp_path / "layout")
    run(
        "skopeo", "--insecure-policy", "--tmpdir", tmp_path, "copy", "--dest-compress",
        f"--dest-compress-format={compression}", f"oci:{tmp_path}/layout:test",
        f"dir:{tmp_path}/copy",
    )  # fmt: skip
    manifest = json.loads((tmp_path / "copy/manifest.json").read_bytes())
    names = [layer["digest"].partition(":")[2] for layer in manifest["layers"]]
    assert [content((tmp_path / "copy" / name).read_bytes()) for name in names] == layers


@pytest.mark.programs("gzip")
def test_gzip_reads_what_we_compress(tmp_path: Path) -> None:
    data = os.urandom(100_000) * 30
    (tmp_path / "a.gz").write_bytes(compressed(data))
    run("gzip", "--test", tmp_path / "a.gz")
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == data


def test_overlayfs_shows_what_a_cell_changed_after_both_ways(tmp_path: Path, tree: Path) -> None:
    """A real upper, packed and unpacked, shows the same on the same layer."""
    if why := overlay_problem():
        pytest.skip(f"no overlay here: {why}")
    low = unpacked(packed(tree), tmp_path / "low")
    for name in ("up", "work", "at", "wanted"):
        (tmp_path / name).mkdir()
    (tmp_path / "up").chmod(0o755)
    script = (
        "mount -t overlay o -o lowerdir=low,upperdir=up,workdir=work,userxattr at && cd at &&"
        "rm -r deep && mkdir deep && echo new > deep/new && rm link && echo more >> plain &&"
        "mv tool tool2 && rmdir empty && chmod 600 holes && cd .. &&"
        "cp -a --no-preserve=links at/. wanted/"
    )
    run("unshare", *_unshare().split(), "sh", "-ec", script, cwd=tmp_path)
    layer = unpacked(
        pack_of(tmp_path / "up", Packing(epoch_s=1 << 33, owner=PACKING.owner)), tmp_path / "layer"
    )
    assert contents(overlaid([low, layer], tmp_path)) == contents(tmp_path / "wanted")


def pack_of(folder: Path, packing: Packing) -> bytes:
    out = io.BytesIO()
    pack(folder, out, packing)
    return out.getvalue()
