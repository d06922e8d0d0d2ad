"""The root file system of an image with layers, as plan for a session.

What Docker puts on top of an image is put on top here too: /dev, /proc, /tmp, hosts and resolver,
and the notebook's folder. ENV, WORKDIR and USER of the image count. Root of an image is who runs
the session's init, so cells of such an image have a user of their own, jovyan.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import host
from sandbox_kernel.image.accounts import TABLE_BYTES, Account, find_account
from sandbox_kernel.image.image_config import ImageConfig
from sandbox_kernel.image.view import View
from sandbox_kernel.model import CELL_UID, Bind, Image, Layers

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Docker's, for an image that sets none."""
AGENT = "/opt/sandbox-kernel/agent"
"""Where a container shows what the guest needs beyond an image's own packages."""
JOVYAN = Account(CELL_UID, CELL_UID, "jovyan", host.HOME)

_FOLDERS = (
    ("/dev", 0o755, 0, 0),
    ("/dev/pts", 0o755, 0, 0),
    ("/dev/shm", 0o1777, 0, 0),  # noqa: S108 - a path inside the container
    ("/etc", 0o755, 0, 0),
    ("/proc", 0o555, 0, 0),
    ("/tmp", 0o1777, 0, 0),  # noqa: S108 - a path inside the container
)


@dataclass(frozen=True)
class Interpreter:
    """The Python of an image, and the folder on the host with what the guest needs in it."""

    path: str
    agent: str = ""
    needs_tmpfs: bool = False
    """Whether its C library makes semaphores only in a /dev/shm that is a tmpfs."""


def layered_image(
    reference: str, config: ImageConfig, layers: Layers, interpreter: Interpreter
) -> Image:
    """Give the plan of an image; raises ImageError where its USER cannot be."""
    view = View([f"{layers.folder}/{name}" for name in layers.names])
    account = cell_account(view, config.user)
    binds = (Bind(interpreter.agent, AGENT),) if interpreter.agent else ()
    folders = [*_FOLDERS, ("/workspace", 0o755, account.uid, account.gid)]
    if view.find(account.home) is None:
        folders.append((account.home, 0o755, account.uid, account.gid))
    return Image(
        reference=reference,
        binds=binds,
        layers=layers,
        files=(*_tables(view, account), *host.NAMES),
        folders=tuple(folders),
        tmpfs=("/dev/shm",) if interpreter.needs_tmpfs else (),  # noqa: S108 - inside
        python=(interpreter.path,),
        env=_environment(config, account),
        home=account.home,
        packages=(AGENT,) if binds else (),
        working_dir=working_dir(config),
        uid=account.uid,
        gid=account.gid,
    )


def cell_account(view: View, user: str) -> Account:
    """Give whom cells of an image with this USER run as; raises ImageError."""
    account = find_account(view, user) if user else JOVYAN
    if account.uid == 0:
        return JOVYAN
    if account.gid == 0:
        account = replace(account, gid=account.uid)
    return replace(account, home=account.home or host.HOME, name=account.name or "jovyan")


def working_dir(config: ImageConfig) -> str:
    """Give where cells begin by the image's word; empty if it has none."""
    # Builders write / where no WORKDIR was set.
    return config.working_dir if config.working_dir not in ("", "/") else ""


def _tables(view: View, account: Account) -> list[tuple[str, str]]:
    """Give passwd and group of the image with the cell's user in them."""
    row = f"{account.name}:x:{account.uid}:{account.gid}:{account.name}:{account.home}:/bin/sh"
    wanted = {"/etc/passwd": (row, account.uid), "/etc/group": ("", account.gid)}
    wanted["/etc/group"] = (f"{account.name}:x:{account.gid}:", account.gid)
    found = []
    for path, (line, number) in wanted.items():
        text = view.read(path, TABLE_BYTES).decode("utf-8", "replace")
        rows = [one.split(":") for one in text.split("\n")]
        if not any(len(fields) > 2 and fields[2] == str(number) for fields in rows):
            text = f"{text.rstrip()}\n{line}\n".lstrip()
        found.append((path, text))
    return found


def _environment(config: ImageConfig, account: Account) -> tuple[tuple[str, str], ...]:
    """Give what the image says, over what the kernel would say."""
    env = {
        "PATH": PATH,
        "HOME": account.home,
        "USER": account.name,
        "LOGNAME": account.name,
        "LANG": "C.UTF-8",
        **dict(host.NOTEBOOK_ENV),
    }
    return tuple({**env, **dict(config.env)}.items())


def find_python(reference: str, config: ImageConfig, view: View) -> str:
    """Give the path of the interpreter that the image's PATH finds; raises ImageError."""
    folders = dict(config.env).get("PATH", PATH).split(":")
    for name in ("python3", "python"):
        for folder in folders:
            entry = view.find(f"{folder}/{name}") if folder.startswith("/") else None
            if entry is not None and entry.is_file and entry.info.st_mode & 0o111:
                return f"{folder.rstrip('/')}/{name}"
    raise ImageError(
        f"image {reference!r} has no Python",
        hint=f"install one (3.9 or newer) in it; looked for python3 in {':'.join(folders)}",
    )
