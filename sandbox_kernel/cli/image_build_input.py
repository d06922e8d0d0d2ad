"""What `image build` is given: Dockerfile, context, arguments, labels and secrets."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.errors import ConfigError

STREAM = "-"
MAX_DOCKERFILE_BYTES = 4 << 20
EPOCH = "SOURCE_DATE_EPOCH"
_NAMES = ("Dockerfile", "Containerfile")
_ARCHIVES = ((0, b"\x1f\x8b"), (0, b"BZh"), (0, b"\xfd7zXZ"), (257, b"ustar"))


@dataclass(frozen=True)
class Sources:
    """The folder to copy from, and the Dockerfile."""

    context: Path
    dockerfile: Path


@contextmanager
def sources(context: str, file: str | None) -> Iterator[Sources]:
    """Find context and Dockerfile; what comes over standard input lies in a folder for as long.

    Raises ConfigError.
    """
    _check(context, file)
    with ExitStack() as stack:
        if STREAM not in (context, file):
            folder = Path(context)
            yield Sources(folder, Path(file) if file is not None else _default(folder))
            return
        named = tempfile.TemporaryDirectory(prefix="sandbox-kernel-build-")
        dockerfile = Path(stack.enter_context(named)) / _NAMES[0]
        dockerfile.write_bytes(_standard_input())
        empty = dockerfile.parent / "context"
        empty.mkdir()
        yield Sources(empty if context == STREAM else Path(context), dockerfile)


def _check(context: str, file: str | None) -> None:
    if context == STREAM:
        if file is not None:
            raise ConfigError(
                f"--file {file} and the CONTEXT - exclude each other",
                hint="with - as CONTEXT the Dockerfile comes from standard input",
            )
    elif "://" in context or context.startswith("git@"):
        raise ConfigError(
            f"{context!r} is no folder: a CONTEXT elsewhere is not fetched",
            hint="clone or unpack it, and name the folder",
        )
    elif not Path(context).is_dir():
        raise ConfigError(
            f"the CONTEXT {context!r} is not a folder",
            hint="name the folder that the Dockerfile is in, for example .",
        )


def _default(folder: Path) -> Path:
    """Give the Dockerfile of a context, which podman's users call Containerfile."""
    found = [folder / name for name in _NAMES if (folder / name).is_file()]
    return found[0] if found else folder / _NAMES[0]


def _standard_input() -> bytes:
    text = sys.stdin.buffer.read(MAX_DOCKERFILE_BYTES + 1)
    if any(text[at : at + len(magic)] == magic for at, magic in _ARCHIVES):
        raise ConfigError(
            "standard input is an archive, not a Dockerfile",
            hint="unpack it, and name its folder as CONTEXT",
        )
    if len(text) > MAX_DOCKERFILE_BYTES:
        raise ConfigError(
            f"the Dockerfile on standard input has more than {MAX_DOCKERFILE_BYTES} bytes",
            hint="is it another file?",
        )
    return text


def pairs(texts: Sequence[str], option: str) -> dict[str, str]:
    """Read `K=V` texts of an option; raises ConfigError."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise ConfigError(f"{option} {text}: there is no value", hint=f"{option} NAME=VALUE")
        found[name] = value
    return found


def arguments(texts: Sequence[str]) -> dict[str, str]:
    """Read build arguments; one without a value has that of the environment, if it is there."""
    given = [text if "=" in text else f"{text}={os.environ[text]}" for text in texts if _set(text)]
    return pairs(given, "--build-arg")


def _set(text: str) -> bool:
    return not text or "=" in text or text in os.environ


def epoch_s(given: str | None) -> int:
    """Give the time that no file of the image is newer than; raises ConfigError."""
    text = given if given is not None else os.environ.get(EPOCH, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise ConfigError(f"{EPOCH}={text} is no time", hint="it is a number of seconds since 1970")
    return int(text)


def secrets(texts: Sequence[str], stack: ExitStack) -> dict[str, Path]:
    """Read `id=ID,src=FILE` and `id=ID,env=VAR`; raises ConfigError.

    The value of a variable lies in memory until the stack is left, on no disk.
    """
    found = {}
    for text in texts:
        name, file, variable = _secret(text)
        if file:
            if not os.access(file, os.R_OK):
                raise ConfigError(
                    f"--secret {text}: {file} cannot be read", hint="name a file that you may read"
                )
            found[name] = Path(file)
        elif variable not in os.environ:
            raise ConfigError(
                f"--secret {text}: the variable {variable} is not set",
                hint="set it, or name a file: src=FILE",
            )
        else:
            found[name] = _in_memory(os.environb[os.fsencode(variable)], stack.callback)
    return found


def _secret(text: str) -> tuple[str, str, str]:
    """Give the ID, and the file or the variable; as in Docker it may be named like the ID."""
    fields = dict(part.partition("=")[::2] for part in text.split(","))
    kinds = {"type": ("file", "env")}
    allowed = {"id", "src", "source", "env", "type"}
    unknown = [key for key in fields if key not in allowed]
    if unknown or not fields.get("id") or fields.get("type", "file") not in kinds["type"]:
        what = f"{unknown[0]!r} is not known" if unknown else "it has no id, or an unknown type"
        raise ConfigError(f"--secret {text}: {what}", hint="id=ID,src=FILE or id=ID,env=VAR")
    file = fields.get("src") or fields.get("source") or ""
    variable = fields.get("env", "")
    if file and variable:
        raise ConfigError(f"--secret {text}: it has src and env", hint="leave one out")
    return fields["id"], file, variable or fields["id"]


def _in_memory(value: bytes, at_end: Callable[..., object]) -> Path:
    fd = os.memfd_create("secret")
    at_end(os.close, fd)
    os.write(fd, value)
    return Path(f"/proc/self/fd/{fd}")
