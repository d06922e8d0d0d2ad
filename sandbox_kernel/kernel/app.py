"""The start of a kernel process: read the settings, begin the session, then load Jupyter.

Order is what makes the start fast. A session needs a third of a second to come up, and so do
the libraries that speak Jupyter; begun first, the one hides behind the other. So this module
must not import ipykernel, IPython or zmq at its top.
"""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from traitlets import TraitError
from traitlets.config import Application, Config

from sandbox_kernel.config import SandboxConfig, freeze
from sandbox_kernel.errors import ConfigError, SandboxError
from sandbox_kernel.image import host
from sandbox_kernel.kernel.lazy import defer
from sandbox_kernel.kernel.parent import ParentWatch
from sandbox_kernel.model import SessionSpec

if TYPE_CHECKING:
    from sandbox_kernel.kernel.engine import Engine
    from sandbox_kernel.model import Image

CONFIG_FILE = "jupyter_sandbox_kernel_config"
_OPTION = "--SandboxConfig."


def launch(argv: Sequence[str] | None = None) -> None:
    """Serve a connection file until the client ends it; `argv` is without the program."""
    # Clients interrupt by message; a Ctrl-C in their terminal must not end the kernel.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    arguments = list(sys.argv[1:] if argv is None else argv)
    settings = SpecReader(arguments)
    serve(arguments, settings.read, open_session)


def serve(
    arguments: Sequence[str],
    read_spec: Callable[[], SessionSpec],
    open_session: Callable[[SessionSpec], Engine],
) -> None:
    """Run a kernel whose sessions come from `open_session`.

    The first is opened before the libraries are loaded. Where that fails, the kernel tries
    again at the first cell, and the error stands there for the user to read.
    """
    parent_watch = ParentWatch.of_environment()
    spec = session = None
    try:
        spec = read_spec()
        session = open_session(spec)
    except SandboxError:
        spec = None

    defer("jupyter_client", {"write_connection_file": "connect"})
    defer("IPython")
    from sandbox_kernel.kernel.host import SandboxKernelApp  # noqa: PLC0415 - see above

    app = SandboxKernelApp.instance(
        read_spec=read_spec, open_session=open_session, parent_watch=parent_watch
    )
    app.initialize(list(arguments))
    if spec is not None and session is not None:
        app.kernel.sessions.adopt(spec, session)
    app.start()


def open_session(spec: SessionSpec) -> Engine:
    """Begin a session; it comes up while the caller goes on. Raises SandboxError."""
    from sandbox_kernel.session.session import Session  # noqa: PLC0415 - heavy, and not for all

    session = Session(spec)
    session.begin()
    return session


def find_image(reference: str, waived: frozenset[str]) -> Image:
    """Give the image that sessions run in; raises ImageError, HostError."""
    if reference == host.REFERENCE:
        return host.host_image()
    from sandbox_kernel.build.session_image import (  # noqa: PLC0415 - the store is not for all
        session_image,
    )

    return session_image(reference, waived=waived)


class SettingsFile(Application):
    """The part of traitlets that reads arguments and configuration files."""

    name = "jupyter-sandbox-kernel"
    classes = [SandboxConfig]
    raise_config_file_errors = True


class SpecReader:
    """Give a new spec, with a new id, at every call of `read`."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = [word for word in arguments if word.startswith(_OPTION)]

    def read(self) -> SessionSpec:
        """Read arguments and files and check all values; raises ConfigError or ImageError."""
        settings = freeze(read_settings(self._arguments))
        try:
            folder = str(Path.cwd())
        except OSError as error:
            raise ConfigError(
                f"the folder that the kernel was started in is gone: {error.strerror}",
                hint="open the notebook from a folder that exists",
            ) from error
        image = find_image(settings.image, settings.waived)
        return SessionSpec(
            session_id=uuid.uuid4().hex[:12],
            image=image,
            workspace=folder if settings.workspace_mode != "none" else "",
            workspace_mode=settings.workspace_mode,
            limits=settings.limits,
            ceiling=settings.ceiling,
            grace_s=settings.grace_s,
            waived=settings.waived,
        )


def read_settings(arguments: Sequence[str]) -> SandboxConfig:
    """Give the settings of `--SandboxConfig.*` arguments over those of configuration files.

    The files are `jupyter_sandbox_kernel_config.py` or `.json` on Jupyter's configuration path.
    Raises ConfigError, also for a name that is no setting: it may be a limit with a slip.
    """
    from jupyter_core.paths import jupyter_config_path  # noqa: PLC0415 - not for tests

    reader = SettingsFile()
    try:
        reader.parse_command_line(list(arguments))
        reader.load_config_file(CONFIG_FILE, path=jupyter_config_path())
        _check_names(reader.config)
        return SandboxConfig(config=reader.config)
    except TraitError as error:
        raise ConfigError(str(error), hint="see `sandbox-kernel install --help`") from None
    except Exception as error:  # a configuration file is a program, and may raise anything
        raise ConfigError(
            f"a configuration file {CONFIG_FILE}.py or .json cannot be read: {error}",
            hint="`jupyter --paths` tells where it is looked for",
        ) from error


def _check_names(config: Config) -> None:
    known = SandboxConfig.class_own_traits(config=True)
    for name in config.get("SandboxConfig", {}):
        if name not in known:
            raise ConfigError(
                f"there is no setting {name!r}", hint=f"there is {', '.join(sorted(known))}"
            )
