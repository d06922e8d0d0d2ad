"""Build the guest's disk, and keep it by the content of all that goes into it.

A disk is built under another name and renamed when it is whole, so a folder in the cache is always
a complete image. No step needs a loop device or a mount; an ordinary user with a range of ids will do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUEST = Path(__file__).parent / "guest"
SUITE = "bookworm"
GUEST_PYTHON = "3.11"
DISK_BYTES = 3 << 30
PACKAGES = (
    "dbus",
    "dbus-user-session",
    "initramfs-tools",
    "iproute2",
    "kmod",
    "libpam-systemd",
    "linux-image-cloud-amd64",
    "login",
    "lz4",
    "passwd",
    "procps",
    "python3",
    "python3-venv",
    "systemd",
    "systemd-sysv",
    "udev",
    "uidmap",
    "util-linux",
)
# What the suites of the guest import, by the names of the extra `test`.
TEST_DEPENDENCIES = ("hypothesis", "numpy", "pytest", "pytest-asyncio", "pytest-timeout")
# manylinux tags that Debian 12's glibc 2.36 can load.
PLATFORMS = (
    "manylinux_2_34_x86_64",
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_26_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux_2_12_x86_64",
    "manylinux2010_x86_64",
    "manylinux_2_5_x86_64",
    "manylinux1_x86_64",
)
NOT_NEEDED = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")

Tell = Callable[[str], None]


class ImageError(Exception):
    """The image could not be built; the message says at which step."""


@dataclass(frozen=True)
class Image:
    """A built guest: a raw disk, and what qemu loads in place of a boot loader."""

    folder: Path

    @property
    def disk(self) -> Path:
        """The root file system, ext4 without a partition table; never opened for writing."""
        return self.folder / "disk.ext4"

    @property
    def kernel(self) -> Path:
        """Linux."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initial file system."""
        return self.folder / "initrd.img"


def cache_folder() -> Path:
    """Give the folder that holds images, and the state of a guest that was brought up by hand."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sandbox-kernel-vm"


def requirements() -> list[str]:
    """Give what the guest's Python needs beside the project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted: list[str] = list(project["dependencies"])
    for line in project["optional-dependencies"]["test"]:
        if re.split(r"[^\w.-]", line, maxsplit=1)[0] in TEST_DEPENDENCIES:
            wanted.append(line)
    return wanted


def content_key() -> str:
    """Hash everything that decides what is on the disk."""
    digest = hashlib.sha256()
    parts: list[bytes] = [Path(__file__).read_bytes(), "\n".join(requirements()).encode()]
    for path in sorted(GUEST.iterdir()):
        if path.is_file():
            parts += [path.name.encode(), path.read_bytes()]
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]


def ensure(tell: Tell) -> Image:
    """Give the image for the present content, built if it is not there; raises ImageError."""
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"image-{content_key()}"
    with _lock(cache / "lock"):
        if folder.is_dir():
            tell(f"image {folder.name}: from the cache")
            os.utime(folder)
            return Image(folder)
        # With the lock held, these belong to builders that were killed.
        for half in cache.glob("building-*"):
            shutil.rmtree(half)
        with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as name:
            whole = Path(name) / "image"
            whole.mkdir()
            _build(whole, tell)
            whole.rename(folder)
        _forget_old(cache, keep=folder)
    return Image(folder)


def _build(target: Path, tell: Tell) -> None:
    # Ids of a range cannot look into a home folder; they must reach what they unpack.
    with tempfile.TemporaryDirectory(prefix="sandbox-kernel-vm-", dir="/var/tmp") as name:
        work = Path(name)
        work.chmod(0o711)
        with _phase("wheels", tell):
            _download_wheels(work)
        with _phase("mmdebstrap", tell):
            _bootstrap(work)
        with _phase("disk", tell):
            _make_disk(work, target)


@contextlib.contextmanager
def _phase(name: str, tell: Tell) -> Iterator[None]:
    begin_s = time.monotonic()
    yield
    tell(f"image: {name} took {time.monotonic() - begin_s:.1f} s")


def _download_wheels(work: Path) -> None:
    (work / "requirements.txt").write_text("\n".join(requirements()) + "\n", "utf-8")
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:"]
    argv += [f"--python-version={GUEST_PYTHON}", "--implementation=cp"]
    argv += [f"--platform={platform}" for platform in PLATFORMS]
    argv += [f"--dest={work / 'wheels'}", f"--requirement={work / 'requirements.txt'}"]
    _run(argv)


def _bootstrap(work: Path) -> None:
    files = [path for path in sorted(GUEST.iterdir()) if path.is_file()]
    copied = [str(path) for path in (*files, work / "wheels", work / "requirements.txt")]
    argv = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(PACKAGES)}"]
    argv += [f"--dpkgopt=path-exclude={pattern}" for pattern in NOT_NEEDED]
    argv += ["--aptopt=Acquire::Retries 3"]
    # These run where the new root is "$1"; copy-in reads as the caller, whatever the mode.
    argv += ['--customize-hook=mkdir -p "$1/opt/vm"']
    argv += [f"--customize-hook=copy-in {shlex.join(copied)} /opt/vm"]
    argv += ['--customize-hook=chroot "$1" sh /opt/vm/customize.sh']
    _run([*argv, SUITE, str(work / "root.tar")])


def _make_disk(work: Path, target: Path) -> None:
    tree, disk = work / "as-root" / "tree", work / "as-root" / "disk.ext4"
    (work / "as-root").mkdir()
    # mke2fs takes owners from the files, so they are unpacked by somebody who may give them away.
    script = (
        'set -e; mkdir "$2"; tar -x -p --numeric-owner --xattrs --xattrs-include="*" '
        '--exclude="./dev/*" -f "$1" -C "$2"; cp "$2"/boot/vmlinuz-* "$4/vmlinuz"; '
        'cp "$2"/boot/initrd.img-* "$4/initrd.img"; chmod 644 "$4"/*; '
        'PATH=$PATH:/usr/sbin:/sbin mke2fs -q -t ext4 -m 0 -L root -d "$2" "$3" "$5"'
    )
    size = f"{DISK_BYTES >> 10}k"
    arguments = [str(work / "root.tar"), str(tree), str(disk), str(work / "as-root"), size]
    owner = [] if os.geteuid() == 0 else ["mmdebstrap", "--unshare-helper"]
    (work / "as-root").chmod(0o777)
    try:
        _run([*owner, "sh", "-c", script, "sh", *arguments])
        for name in ("vmlinuz", "initrd.img", "disk.ext4"):
            _run(["cp", "--sparse=always", str(work / "as-root" / name), str(target / name)])
    finally:
        _run([*owner, "rm", "-rf", str(tree)])


def _run(argv: list[str]) -> None:
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise ImageError(f"there is no {argv[0]}; .ci/packages vm installs it") from error
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise ImageError(f"{' '.join(argv[:2])} ended with {done.returncode}:\n{tail}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _forget_old(cache: Path, *, keep: Path, count: int = 3) -> None:
    """Keep the images that were used last; a guest that runs has its disk open."""
    images = sorted(cache.glob("image-*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in images[count:]:
        if old != keep:
            shutil.rmtree(old, ignore_errors=True)
