"""Which disks a session's cells reach, and how a limit of their traffic is lifted to end a cell."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.cgroup import Cgroup, CgroupTree, session_name
from sandbox_kernel.linux.cgroup_io import Ground, grounds
from sandbox_kernel.model import Bind, SessionSpec
from sandbox_kernel.session import disks
from sandbox_kernel.session.disks import DiskTraffic
from tests.fakes.cgroupfs import DISK, FakeHost
from tests.fakes.session import SPEC

RATE = 4 << 20
LIMITED = replace(SPEC.limits, io_bytes_per_s=RATE)


@pytest.fixture(params=["v2", "hybrid", "v1"])
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cgroup]:
    host = FakeHost(tmp_path, request.param)
    tree = CgroupTree.detect(proc=host.proc, root=host.root, files=host.files)
    with tree.session(session_name("disks"), io=True) as group:
        yield group


def spec(mode: str = "none", **changes: object) -> SessionSpec:
    made = replace(SPEC, limits=LIMITED, ceiling=LIMITED, workspace_mode=mode, workspace="/work")
    return replace(made, **changes)  # type: ignore[arg-type]


def lie_on(monkeypatch: pytest.MonkeyPatch, fs_type: str, *found: tuple[int, int]) -> None:
    """Have every file lie on a file system of this type, on these disks."""

    def tell(paths: list[str], *, inside: bool = False) -> list[Ground]:
        del inside
        return [Ground(path, fs_type, found) for path in paths]

    monkeypatch.setattr(disks, "grounds", tell)


def bound(group: Cgroup) -> str:
    """Give the limit that a group's file has; empty for none."""
    names = ("io.max", "blkio.throttle.read_bps_device")
    files = [Path(path, name) for path in group.paths for name in names]
    text = next(file.read_text() for file in files if file.exists()).strip()
    lifted = ("8:0 0", "8:0 rbps=max wbps=max")
    return "" if text in lifted else text


# ---- what counts


def test_a_group_is_limited(session: Cgroup, monkeypatch: pytest.MonkeyPatch) -> None:
    lie_on(monkeypatch, "ext4", DISK)
    traffic = DiskTraffic(spec("overlay"), session)
    with session.child("cell") as cell:
        traffic.limit(cell, LIMITED)
        assert str(RATE) in bound(cell)
    traffic.limit_remains()
    assert bound(session) == ""


def test_what_is_not_asked_for_is_not_looked_at(session: Cgroup) -> None:
    for unlimited in (SPEC, spec(waived=frozenset({"io"}))):
        traffic = DiskTraffic(unlimited, session)
        with session.child("cell") as cell:
            traffic.limit(cell, unlimited.limits)
            assert bound(cell) == ""


@pytest.mark.parametrize("fs_type", ["overlay", "nfs4", "zfs", "fuse.sshfs"])
def test_a_file_system_without_a_disk_is_named(
    session: Cgroup, monkeypatch: pytest.MonkeyPatch, fs_type: str
) -> None:
    lie_on(monkeypatch, fs_type)
    with pytest.raises(HostError) as caught:
        DiskTraffic(spec("ro"), session)
    assert f"({fs_type}) that names no disk" in caught.value.message
    assert caught.value.hint.endswith("--waive io")


def test_what_lies_in_memory_needs_no_disk(
    session: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie_on(monkeypatch, "tmpfs")
    traffic = DiskTraffic(spec("rw"), session)
    refused = pytest.raises(HostError, match="no disk is behind the files")
    with session.child("cell") as cell, refused:
        traffic.limit(cell, LIMITED)


def test_a_folder_that_is_gone_is_named(session: Cgroup, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    with pytest.raises(HostError, match=f"cannot limit io: {gone} cannot be looked at"):
        DiskTraffic(spec("ro", workspace=gone), session)


def test_a_missing_controller_is_named(tmp_path: Path) -> None:
    host = FakeHost(tmp_path, "v2")
    (host.own("") / "cgroup.controllers").write_text("cpu memory pids")
    tree = CgroupTree.detect(proc=host.proc, root=host.root, files=host.files)
    with tree.session(session_name("disks"), io=True) as group, group.child("heads") as heads:
        traffic = DiskTraffic(spec("rw"), group)
        with pytest.raises(HostError) as caught:
            traffic.limit(heads, LIMITED)
    assert "cannot limit io: controller io is not delegated to" in caught.value.message
    assert "Delegate=" in caught.value.hint


def test_what_cells_write_counts_on_v2_alone(
    session: Cgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie_on(monkeypatch, "xfs", DISK)
    if not Path(session.paths[0], "io.max").exists():
        with pytest.raises(HostError, match=r"workspace=rw.*who wrote what"):
            DiskTraffic(spec("rw"), session)
        return
    traffic = DiskTraffic(spec("rw"), session)
    traffic.limit_remains()
    assert str(RATE) in bound(session)
    lie_on(monkeypatch, "vfat", DISK)
    with pytest.raises(HostError, match="vfat does not tell who wrote"):
        DiskTraffic(spec("rw"), session)


def test_the_images_folders_count_and_its_files_do_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    binds = (Bind(str(tmp_path), "/a"), Bind(str(tmp_path / "file"), "/b"))
    seen: list[tuple[list[str], bool]] = []

    def tell(paths: list[str], *, inside: bool = False) -> list[Ground]:
        seen.append((paths, inside))
        return [Ground(path, "ext4", (DISK,)) for path in paths]

    monkeypatch.setattr(disks, "grounds", tell)
    host = FakeHost(tmp_path / "host", "v2")
    tree = CgroupTree.detect(proc=host.proc, root=host.root, files=host.files)
    with tree.session(session_name("disks"), io=True) as group:
        DiskTraffic(spec("overlay", image=replace(SPEC.image, binds=binds)), group)
    assert seen == [([str(tmp_path), disks.PACKAGE], True), (["/work"], False)]


# ---- how it is lifted


def test_a_group_that_is_killed_is_not_slowed_down(session: Cgroup) -> None:
    with session.child("cell") as cell, session.child("next") as other:
        for group in (session, cell, other):
            if group is not session or group.counts_writeback:
                group.limit(io_bytes_per_s=RATE, devices=(DISK,))
        above = bound(session)
        cell.kill()
        assert (bound(cell), bound(session)) == ("", "")
        assert str(RATE) in bound(other)
        cell.remove()
        cell.close()
        assert bound(session) == above


def test_a_limit_above_waits_for_the_last_that_is_killed(session: Cgroup) -> None:
    session.limit(io_bytes_per_s=RATE, devices=(DISK,))
    first, second = session.child("first"), session.child("second")
    for group in (first, second):
        group.kill()
        group.remove()
    first.close()
    assert bound(session) == ""
    second.close()
    assert str(RATE) in bound(session)


def test_a_group_that_ends_after_its_session_leaves_it_alone(session: Cgroup) -> None:
    """Descriptors of a session that is closed may be another's by then."""
    session.limit(io_bytes_per_s=RATE, devices=(DISK,))
    above, cell = bound(session), session.child("cell")
    session.close()
    cell.kill()
    assert bound(session) == above
    cell.remove()
    cell.close()


def test_what_is_frozen_or_killed_with_its_session_is_not_slowed_down(session: Cgroup) -> None:
    with session.child("cell") as cell:
        for end in (cell.freeze, session.kill):
            cell.limit(io_bytes_per_s=RATE, devices=(DISK,))
            end()
            assert bound(cell) == ""
        cell.thaw()


# ---- what files lie on


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Give a folder with a /sys of two disks in one btrfs, and an empty mountinfo."""
    for number, name in (("8:0", "sda"), ("8:16", "sdb")):
        folder = tmp_path / "sys/devices" / name
        folder.mkdir(parents=True)
        (folder / "dev").write_text(f"{number}\n")
        for link in (f"dev/block/{number}", f"fs/btrfs/some-id/devices/{name}"):
            (tmp_path / "sys" / link).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "sys" / link).symlink_to(folder)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "tree/inner").mkdir(parents=True)
    return tmp_path


def mounted(host: Path, *lines: str) -> None:
    text = "".join(f"1 1 0:9 / {line} rw\n" for line in lines)
    (host / "proc/self/mountinfo").write_text(text)


def test_every_disk_of_a_pool_counts(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_kernel.linux.cgroup_io._named", lambda _: (8, 0))
    mounted(host, f"{host}/tree rw - btrfs /dev/sda")
    (found,) = grounds([host / "tree"], sys=host / "sys", proc=host / "proc")
    assert found == Ground(f"{host}/tree", "btrfs", ((8, 0), (8, 16)))


def test_mounts_inside_count_where_they_are_shown(host: Path) -> None:
    mounted(
        host,
        f"{host}/tree rw - tmpfs t",
        f"{host}/tree/inner rw - nfs4 server:/x",
        f"{host}/tree/covered rw - ext4 /dev/none",
        f"{host}/treetop rw - zfs pool",
    )
    paths = {"sys": host / "sys", "proc": host / "proc"}
    found = grounds([host / "tree"], inside=True, **paths)
    assert [(g.fs_type, os.path.basename(g.path)) for g in found] == [
        ("tmpfs", "tree"),
        ("nfs4", "inner"),
    ]
    assert [g.fs_type for g in grounds([host / "tree"], **paths)] == ["tmpfs"]
