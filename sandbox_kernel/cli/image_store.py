"""What all commands for images share: the store, and the values that users write."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click

from sandbox_kernel.errors import ConfigError, ImageError
from sandbox_kernel.image.platform import Platform
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import VARIABLE, Store

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Add `--json`, whose value is `as_json`."""
    text = "Print one JSON document, and nothing else, on stdout."
    return click.option("--json", "as_json", is_flag=True, help=text)(command)


def quiet_option(command: Command) -> Command:
    """Add `--quiet`: IDs only."""
    return click.option("-q", "--quiet", is_flag=True, help="Print IDs only.")(command)


def platform_option(command: Command) -> Command:
    """Add `--platform`."""
    text = "For another platform than this machine's, for example linux/arm64."
    return click.option("--platform", metavar="OS/ARCH", help=text)(command)


def insecure_option(command: Command) -> Command:
    """Add `--insecure`."""
    text = "Plain HTTP, which registries on this machine have without it."
    return click.option("--insecure", is_flag=True, help=text)(command)


@contextmanager
def opened_store(*, unpacks: bool = False) -> Iterator[Store]:
    """Open the user's store; SIGTERM ends what happens within as Ctrl-C does.

    What a command `unpacks` is flushed to the disk at its end, or the next boot would unpack it
    again. Raises ImageError where its disk fails.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with Store.open() as store:
            yield store
            if unpacks:
                store.settle()
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise ImageError(
            f"{where}{error.strerror or error}",
            hint=f"{VARIABLE} may name a folder on another disk for images",
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def read_reference(text: str) -> Reference:
    """Read the name of an image; raises ConfigError."""
    try:
        return Reference.parse(text)
    except ImageError as error:
        raise ConfigError(error.message, hint=error.hint) from error


def read_platform(text: str | None) -> Platform | None:
    """Read a platform, None for none; raises ConfigError."""
    try:
        return Platform.parse(text) if text is not None else None
    except ImageError as error:
        raise ConfigError(error.message, hint=error.hint) from error
