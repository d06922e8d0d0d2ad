"""Unpack the tar of a layer into a folder that overlayfs can take as a lower one.

The work is done by a process of its own, for which the folder is the root: so no mistake here
can reach a file outside. It is exec'ed, not forked, since the callers have threads. Meanwhile this
process reads, decompresses and hashes what it feeds to it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image import child as child_process
from sandbox_kernel.image.unpack_rules import Bounds, Owners, Unpacked
from sandbox_kernel.linux.tree_names import FOLDER_FLAGS

__all__ = ["Bounds", "Owners", "Readable", "Unpacked", "unpack"]

_CHUNK_BYTES = 1 << 20
_DEFAULT_BOUNDS = Bounds()
_CHILD = "sandbox_kernel.image.unpack_child"


class Readable(Protocol):
    """What a tar is read from; `read` gives b"" at the end."""

    def read(self, size: int, /) -> bytes:
        """Give up to `size` bytes."""
        ...


def unpack(  # noqa: PLR0913 - what a layer is, and where it goes
    stream: Readable,
    target: str | Path,
    *,
    bounds: Bounds = _DEFAULT_BOUNDS,
    owners: Owners | None = None,
    lowers: Sequence[str | Path] = (),
    skip_devices: bool = False,
) -> Unpacked:
    """Unpack a tar that is not compressed into the empty folder `target`, to the stream's end.

    `owners` is by default what the user can do. `lowers` are the unpacked layers below, the
    lowest first: hard links to their files are resolved in them, and folders that have no entry
    take their attributes. Raises ImageError with the entry and the reason; what is in `target`
    then is the caller's to remove. Errors of the stream pass through.
    """
    if owners is None:
        owners = Owners.REAL if os.geteuid() == 0 else Owners.RECORDED
    with contextlib.ExitStack() as stack:
        target_fd = stack.enter_context(_opened(target))
        lower_fds = [stack.enter_context(_opened(lower)) for lower in lowers]
        order = {
            "target_fd": target_fd,
            "lower_fds": lower_fds,
            "bounds": asdict(bounds),
            "owners": owners.value,
            "skip_devices": skip_devices,
        }
        fds = (target_fd, *lower_fds)
        child = stack.enter_context(child_process.started(_CHILD, order, fds))
        _feed(stream, child)
        return _answer_of(child)


@contextlib.contextmanager
def _opened(folder: str | Path) -> Iterator[int]:
    try:
        fd = os.open(folder, FOLDER_FLAGS)
    except OSError as error:
        raise ImageError(f"{folder} cannot be opened: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _feed(stream: Readable, child: subprocess.Popen[bytes]) -> None:
    """Write the stream into the child until it ends, or the child has had enough."""
    assert child.stdin is not None  # noqa: S101 - it was started with a pipe
    fd = child.stdin.fileno()
    with contextlib.suppress(OSError):  # EPERM where the user's pipes hold too much already
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _CHUNK_BYTES)
    try:
        while chunk := stream.read(_CHUNK_BYTES):
            view = memoryview(chunk)
            while view:
                view = view[os.write(fd, view) :]
    except BrokenPipeError:
        pass  # it says why
    finally:
        child.stdin.close()


def _answer_of(child: subprocess.Popen[bytes]) -> Unpacked:
    assert child.stdout is not None  # noqa: S101 - it was started with pipes
    assert child.stderr is not None  # noqa: S101
    answer = child.stdout.read()
    said = child.stderr.read()
    child.wait()
    try:
        body = json.loads(answer)
    except ValueError:
        last = said.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ImageError(
            f"the process that unpacks ended with status {child.returncode}: {last[:500]}"
        ) from None
    if "error" in body:
        raise ImageError(body["error"], hint=body["hint"])
    return Unpacked(**body)
