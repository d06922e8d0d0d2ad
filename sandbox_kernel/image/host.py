"""The image `host`: the machine's own Python environment and /usr, read-only.

It needs no download. What a cell sees of the machine is listed here and nowhere else: no home,
no /root, /var, /run, and of /etc only what programs need to start and to talk TLS. Users and
groups, host name and resolver are made up.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

from sandbox_kernel.model import CELL_UID, Bind, Image

REFERENCE = "host"
LABEL = "sandbox-kernel.on-host"
"""Marks an image whose layers belong on top of this machine's folders."""
HOME = "/home/jovyan"

# In the order of Debian's, Fedora's and Arch's root; links such as /lib -> usr/lib stay links.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_ETC = (
    "/etc/alternatives",
    "/etc/ca-certificates",
    "/etc/debian_version",
    "/etc/fonts",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/magic",
    "/etc/mime.types",
    "/etc/os-release",
    "/etc/pki/ca-trust",
    "/etc/pki/tls/certs",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/timezone",
)
_PASSWD = (
    "root:x:0:0:root:/root:/usr/sbin/nologin\n"
    f"jovyan:x:{CELL_UID}:{CELL_UID}:jovyan:{HOME}:/bin/bash\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
)
NAMES = (
    ("/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
    ("/etc/resolv.conf", ""),
)
"""Files that tell the names of hosts; the same in every image."""
_FILES = (
    ("/etc/passwd", _PASSWD),
    ("/etc/group", f"root:x:0:\ntty:x:5:\njovyan:x:{CELL_UID}:\nnogroup:x:65534:\n"),
    ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    *NAMES,
)
NOTEBOOK_ENV = (
    ("TERM", "xterm-color"),
    # numba's other threading layers do not survive a fork.
    ("NUMBA_THREADING_LAYER", "workqueue"),
    ("MPLBACKEND", "module://matplotlib_inline.backend_inline"),
    ("CLICOLOR", "1"),
    ("FORCE_COLOR", "1"),
    ("CLICOLOR_FORCE", "1"),
    ("PAGER", "cat"),
    ("GIT_PAGER", "cat"),
)
"""What a notebook's programs find, in every image."""
_FOLDERS = (
    ("/dev", 0o755, 0, 0),
    ("/dev/pts", 0o755, 0, 0),
    ("/dev/shm", 0o1777, 0, 0),  # noqa: S108 - a path inside the container
    ("/etc", 0o755, 0, 0),
    ("/home", 0o755, 0, 0),
    (HOME, 0o755, CELL_UID, CELL_UID),
    ("/proc", 0o555, 0, 0),
    ("/run", 0o755, 0, 0),
    ("/tmp", 0o1777, 0, 0),  # noqa: S108 - a path inside the container
    ("/var", 0o755, 0, 0),
    ("/var/tmp", 0o1777, 0, 0),  # noqa: S108 - a path inside the container
    ("/workspace", 0o755, CELL_UID, CELL_UID),
)


def host_image() -> Image:
    """Give the image of this very machine and of the Python that runs this."""
    links = tuple((path, os.readlink(path)) for path in _SYSTEM if os.path.islink(path))
    folders = [path for path in _SYSTEM if os.path.isdir(path) and not os.path.islink(path)]
    folders += [path for path in _python_folders() if not _within(path, folders)]
    binds = [Bind(path, path) for path in folders]
    binds += [Bind(os.path.realpath(path), path) for path in _ETC if os.path.exists(path)]
    return Image(
        reference=REFERENCE,
        binds=tuple(binds),
        files=_FILES,
        folders=_FOLDERS,
        links=links,
        python=(sys.executable,),
        env=_environment(),
        home=HOME,
    )


def _python_folders() -> list[str]:
    """Give the folders that the running Python is spread over, outermost first, no doubles."""
    paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, sys.base_exec_prefix}
    paths |= {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}
    paths |= {sysconfig.get_path("platlib")}
    for executable in (sys.executable, os.path.realpath(sys.executable)):
        paths.add(str(Path(executable).parent.parent))
    chosen: list[str] = []
    for path in sorted(os.path.normpath(path) for path in paths):
        if path != "/" and os.path.isdir(path) and not _within(path, chosen):
            chosen.append(path)
    return chosen


def _within(path: str, folders: list[str]) -> bool:
    return any(path == folder or path.startswith(folder + "/") for folder in folders)


def _environment() -> tuple[tuple[str, str], ...]:
    bins = [str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]
    env = {
        "PATH": ":".join(dict.fromkeys(bins)),
        "HOME": HOME,
        "USER": "jovyan",
        "LOGNAME": "jovyan",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        **dict(NOTEBOOK_ENV),
    }
    if "MPLBACKEND" in os.environ:
        env["MPLBACKEND"] = os.environ["MPLBACKEND"]
    if sys.prefix != sys.base_prefix:
        env["VIRTUAL_ENV"] = sys.prefix
    return tuple(env.items())
