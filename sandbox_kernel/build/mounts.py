"""`RUN --mount=…`: what is mounted for one command and leaves no trace in the image."""

from __future__ import annotations

import csv
import posixpath
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sandbox_kernel.errors import BuildError, ConfigError
from sandbox_kernel.units import parse_size

TYPES = ("bind", "cache", "tmpfs", "secret")
SHARINGS = ("shared", "private", "locked")
MAX_ID = (1 << 32) - 2

_ALIASES = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly"}
_TRUE = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}
# Which type takes which key, beside type, target and readonly.
_KEYS = {
    "bind": ("from", "source"),
    "cache": ("from", "source", "id", "sharing", "mode", "uid", "gid"),
    "tmpfs": ("size",),
    "secret": ("source", "id", "required", "env", "mode", "uid", "gid"),
}
_ALL_KEYS = {key for keys in _KEYS.values() for key in keys} | {"type", "target", "readonly"}


@dataclass(frozen=True)
class Mount:
    """One mount of a RUN; empty and None mean that the file says nothing.

    `stage` is a stage or an image to mount from, else it is the build context. `target` is
    absolute. `env` is the variable that holds a secret.
    """

    type: str
    target: str
    stage: str = ""
    source: str = ""
    read_only: bool = False
    id: str = ""
    sharing: str = "shared"
    size_bytes: int | None = None
    required: bool = False
    env: str = ""
    mode: int | None = None
    uid: int | None = None
    gid: int | None = None


def mount_stage(text: str) -> str:
    """Give the stage or image that a mount names, which is no place for variables."""
    found = _fields(text).get("from", "")
    if "$" in found[:-1]:
        raise BuildError(
            f"--mount: from={found} holds a variable",
            hint="name a stage for it: FROM $NAME AS base, then from=base",
        )
    return found


def parse_mount(text: str, expand: Callable[[str], str], working_dir: str = "/") -> Mount:
    """Read the value of one --mount, variables resolved by `expand`; raises BuildError."""
    fields = {
        key: value if key == "from" else expand(value) for key, value in _fields(text).items()
    }
    kind = fields.pop("type", "bind").lower()
    if kind not in TYPES:
        raise BuildError(
            f"--mount=type={kind} is not supported", hint=f"the types are {', '.join(TYPES)}"
        )
    for key in fields:
        if key not in (*_KEYS[kind], "target", "readonly"):
            raise BuildError(
                f"--mount: a {kind} mount takes no {key}",
                hint=f"it takes target, readonly, {', '.join(_KEYS[kind])}",
            )
    mount = _typed(kind, fields)
    mount = _secret(mount, fields) if kind == "secret" else mount
    target = mount.target and posixpath.normpath(posixpath.join("/", working_dir, mount.target))
    target = target.replace("//", "/", 1) if target.startswith("//") else target
    if target in ("", "/") and not (kind == "secret" and mount.env):
        raise BuildError(
            f"--mount: the target {mount.target!r} cannot be mounted on",
            hint="name a folder inside of the image, target=/PATH",
        )
    return replace(mount, target=target, id=mount.id or (target if kind == "cache" else ""))


def _fields(text: str) -> dict[str, str]:
    try:
        rows = list(csv.reader([text], strict=True))
    except csv.Error as error:
        raise BuildError(f"--mount={text}: {error}", hint="write type=…,target=…") from error
    found: dict[str, str] = {}
    for part in rows[0] if rows else []:
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if key in ("readwrite", "rw"):
            key, value = "readonly", _opposite(key, value if equals else "true")
        key = _ALIASES.get(key, key)
        if not equals and key in ("readonly", "required", "env"):
            value = value or ("" if key == "env" else "true")
        elif not equals or key not in _ALL_KEYS:
            raise BuildError(
                f"--mount: {part!r} is not known",
                hint=f"write KEY=VALUE; the keys are {', '.join(sorted(_ALL_KEYS))}",
            )
        if key in found:
            raise BuildError(f"--mount: {key} is given twice", hint="give it once")
        found[key] = value
    return found


def _opposite(key: str, value: str) -> str:
    return "false" if _boolean(key, value) else "true"


def _typed(kind: str, fields: dict[str, str]) -> Mount:
    sharing = fields.get("sharing", "shared").lower()
    if sharing not in SHARINGS:
        raise BuildError(f"--mount: sharing={sharing}", hint=f"one of {', '.join(SHARINGS)}")
    given: dict[str, Any] = {
        "mode": _number(fields, "mode", 8, 0o7777),
        "uid": _number(fields, "uid", 10, MAX_ID),
        "gid": _number(fields, "gid", 10, MAX_ID),
        "size_bytes": _size(fields["size"]) if "size" in fields else None,
        "required": _boolean("required", fields.get("required", "false")),
        # What is not ours to write is read-only unless the file says otherwise.
        "read_only": _boolean("readonly", fields["readonly"])
        if "readonly" in fields
        else kind in ("bind", "secret"),
    }
    return Mount(
        kind,
        fields.get("target", ""),
        stage=fields.get("from", ""),
        source=fields.get("source", ""),
        id=fields.get("id", ""),
        sharing=sharing,
        env=fields.get("env", ""),
        **given,
    )


def _secret(mount: Mount, fields: dict[str, str]) -> Mount:
    """Complete a secret: its id from the source or the target, its target from the id."""
    if mount.source and mount.id:
        raise BuildError("--mount: a secret with both id and source", hint="give one of them")
    name = mount.id or mount.source or posixpath.basename(mount.target)
    if not name:
        raise BuildError("--mount: a secret without id", hint="write type=secret,id=NAME")
    env = (mount.env or name) if "env" in fields else ""
    target = mount.target or ("" if env else f"/run/secrets/{posixpath.basename(name)}")
    return replace(mount, id=name, source="", env=env, target=target)


def _boolean(key: str, value: str) -> bool:
    if value.lower() not in _TRUE:
        raise BuildError(f"--mount: {key}={value}", hint="write true or false")
    return _TRUE[value.lower()]


def _number(fields: dict[str, str], key: str, base: int, most: int) -> int | None:
    text = fields.get(key)
    if text is None:
        return None
    digits = "01234567" if base == 8 else "0123456789"
    # Only plain digits: int() would also take a sign, blanks and underscores.
    if not text or len(text) > 12 or text.strip(digits) or int(text, base) > most:
        raise BuildError(
            f"--mount: {key}={text}",
            hint="write octal digits, 0755" if base == 8 else f"write a number up to {most}",
        )
    return int(text, base)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ConfigError as error:
        raise BuildError(f"--mount: size: {error.message}", hint=error.hint) from error
