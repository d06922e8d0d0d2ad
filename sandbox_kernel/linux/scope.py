"""Ask systemd for a scope of this process' own, whose cgroups it may arrange as it likes.

An ordinary user asks the manager of the user, root that of the system: over a bus, and where none
runs at the manager's own socket. Everything between connecting and the end of systemd's job
happens within one time-out. jeepney only packs and parses messages here, and is imported when the
first one is needed: most kernels need none.
See org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sandbox_kernel.errors import HostError
from sandbox_kernel.linux.mountinfo import parse_own

if TYPE_CHECKING:
    from jeepney import DBusAddress, Message

BUS_TIMEOUT_S = 2.0
UNIT_NAME = re.compile(r"sandbox-kernel-\d+-[0-9a-f]{8}\.scope")
"""The scopes that were asked for here; they are delegated."""
DELEGATED_CONTROLLERS = "cpu cpuset io memory pids"
DROP_IN = "/etc/systemd/system/user@.service.d/delegate.conf"

_UNLIMITED = 2**64 - 1
_MANAGER = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1")
_BUS = ("/org/freedesktop/DBus", "org.freedesktop.DBus")
_ERROR = "org.freedesktop.DBus.Error."
_NOT_SYSTEMD = (f"{_ERROR}ServiceUnknown", f"{_ERROR}NameHasNoOwner", f"{_ERROR}Spawn.")
"""What a bus says that systemd is not on, as those of remote desktops; the last one is a prefix:
the bus tries to start systemd then."""
_NOT_KNOWN = (f"{_ERROR}PropertyReadOnly", f"{_ERROR}UnknownProperty", f"{_ERROR}InvalidArgs")


def delegation_remedy(group: str = "", *, uid: int | None = None) -> str:
    """Say in one line how to delegate all controllers to `group`, a cgroup's path.

    The drop-in for groups below `user@UID.service` or unknown ones, else the line for the unit.
    """
    service = next((part for part in reversed(group.split("/")) if part.endswith(".service")), "")
    if service and not service.startswith("user@"):
        return f"as root add 'Delegate=yes' below [Service]: systemctl edit {service}; restart it"
    number = os.getuid() if uid is None else uid
    manager = service or f"user@{number or 'UID'}.service"
    text = (
        f"as root write '[Service]' and 'Delegate={DELEGATED_CONTROLLERS}', a line each, into "
        f"{DROP_IN}, then run 'systemctl daemon-reload', and log in anew "
        f"or run 'systemctl restart {manager}'"
    )
    if not service:
        text += "; where a system service starts Jupyter, add 'Delegate=yes' to its unit instead"
    return text


@dataclass(frozen=True)
class Systemd:
    """A systemd manager that may give a scope: where its bus is listened to, in words and code."""

    bus: str
    """Which bus, in words."""
    addresses: tuple[str, ...]
    """D-Bus addresses, the likeliest first."""
    slice_name: str
    remedy: str
    """What to do where the bus cannot be reached."""
    private: str = ""
    """The D-Bus address of the manager itself, where no bus runs; empty where it has none."""


def find_systemd(*, uid: int | None = None, environ: Mapping[str, str] = os.environ) -> Systemd:
    """Give the manager that is in charge of a user's processes; root's is the system's."""
    uid = os.geteuid() if uid is None else uid
    if uid == 0:
        return Systemd(
            bus="system bus",
            addresses=("unix:path=/run/dbus/system_bus_socket",),
            slice_name="system.slice",
            remedy="start it with 'systemctl start dbus.socket', or start Jupyter by "
            "'systemd-run --scope -p Delegate=yes jupyter lab'",
            private="unix:path=/run/systemd/private",
        )
    named = environ.get("DBUS_SESSION_BUS_ADDRESS", "")
    runtime = environ.get("XDG_RUNTIME_DIR", "")
    addresses = [
        named if ":" in named else "",
        f"unix:path={runtime}/bus" if runtime.startswith("/") else "",
        f"unix:path=/run/user/{uid}/bus",
    ]
    return Systemd(
        bus="user bus",
        addresses=tuple(dict.fromkeys(filter(None, addresses))),
        slice_name="app.slice",
        remedy="log in anew by ssh or at the console rather than by su or sudo, or have root run "
        f"'loginctl enable-linger {uid}'; the package dbus-user-session must be installed",
        private=f"unix:path=/run/user/{uid}/systemd/private",
    )


def enter_scope(
    manager: Systemd | None = None,
    *,
    proc: Path = Path("/proc"),
    timeout_s: float = BUS_TIMEOUT_S,
) -> str:
    """Move this process into a new delegated scope, and return the scope's name.

    Raises HostError if systemd cannot be reached, refuses, moves nothing, or does not answer in
    time.
    """
    try:
        import jeepney  # noqa: F401, PLC0415 - now: a slow disk shall not count as a slow bus
    except ImportError as error:
        raise HostError(
            f"systemd cannot be asked for a scope: {error}", hint="install it: pip install jeepney"
        ) from error
    manager = manager or find_systemd()
    deadline_s = time.monotonic() + timeout_s
    failures = []
    for address in _worth_trying(manager):
        try:
            unit = _ask(address, manager, deadline_s)
        except TimeoutError as error:
            raise HostError(
                f"the {manager.bus} at {address} does not answer within {timeout_s:g} s",
                hint="look for what it waits for: 'systemctl status' and 'systemctl --user status'",
            ) from error
        except _RefusedError as refused:
            if not refused.name.startswith(_NOT_SYSTEMD):
                raise HostError(
                    f"systemd refuses a scope on the {manager.bus} at {address}: {refused}",
                    hint="see 'journalctl -b' for why; or start Jupyter in a unit with "
                    "'Delegate=yes'",
                ) from refused
            failures.append(f"{address}: no systemd is on it")
        except (OSError, ValueError) as error:
            failures.append(f"{address}: {getattr(error, 'strerror', None) or error}")
        else:
            _check_moved(unit, proc)
            return unit
    raise HostError(f"no {manager.bus} can be reached: {'; '.join(failures)}", hint=manager.remedy)


def _worth_trying(manager: Systemd) -> tuple[str, ...]:
    """Give the buses, and last the manager's own socket where there is one."""
    private = manager.private.removeprefix("unix:path=")
    return (*manager.addresses, manager.private) if os.path.exists(private) else manager.addresses


def _check_moved(unit: str, proc: Path) -> None:
    """Look where this process is: systemd calls a job done that moved no process."""
    own = parse_own((proc / "self/cgroup").read_text(encoding="utf-8"))
    path = own.get(frozenset(), "")
    if unit not in path.split("/"):
        raise HostError(
            f"systemd made {unit}, but this process is in the cgroup {path or 'of no v2 tree'}",
            hint="the user's manager may lack the right to move it: log in anew, or start Jupyter "
            "by 'systemd-run --user --scope -p Delegate=yes jupyter lab'",
        )


class _RefusedError(Exception):
    """The bus or systemd answered with an error; `name` is its D-Bus name."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(f"{text or name} [{name}]" if text else name)
        self.name = name


def _ask(address: str, manager: Systemd, deadline_s: float) -> str:
    """Ask for the scope at one bus and wait until it is there; return its name.

    Raises TimeoutError, _RefusedError, OSError, ValueError for what is not D-Bus.
    """
    from jeepney import DBusAddress  # noqa: PLC0415 - see the module's docstring

    systemd = DBusAddress(*_MANAGER, interface="org.freedesktop.systemd1.Manager")
    with _Connection(address, deadline_s) as bus:
        # At the manager's own socket there is no bus to greet, and every signal comes.
        if address != manager.private:
            bus_object = DBusAddress(*_BUS, interface="org.freedesktop.DBus")
            bus.call(bus_object, "Hello")
            # Before the job begins, or its end could be missed.
            rule = f"type='signal',interface='{systemd.interface}',member='JobRemoved'"
            bus.call(bus_object, "AddMatch", "s", (rule,))
        bus.call(systemd, "Subscribe")
        unit = f"sandbox-kernel-{os.getpid()}-{os.urandom(4).hex()}.scope"
        try:
            job = _start(bus, systemd, unit, _properties(manager) + _LUXURIES)
        except _RefusedError as refused:
            if refused.name not in _NOT_KNOWN:
                raise
            job = _start(bus, systemd, unit, _properties(manager))
        result = bus.job_result(job)
    if result != "done":
        raise _RefusedError(f"job {result}", f"the job that starts {unit} ended as '{result}'")
    return unit


_Property = tuple[str, tuple[str, object]]
_LUXURIES: list[_Property] = [
    ("CollectMode", ("s", "inactive-or-failed")),  # since 236
    ("TasksMax", ("t", _UNLIMITED)),
]
"""What an older systemd, or one with another policy, may not take."""


def _properties(manager: Systemd) -> list[_Property]:
    # 0 stands for the sender: a pid would be another process where systemd is in another PID
    # namespace. A delegated scope also goes on when the kernel kills a cell for memory.
    return [
        ("PIDs", ("au", [0])),
        ("Delegate", ("b", True)),
        ("Description", ("s", "Jupyter kernel in a sandbox")),
        ("Slice", ("s", manager.slice_name)),
    ]


def _start(bus: _Connection, systemd: DBusAddress, unit: str, properties: list[_Property]) -> str:
    """Begin the job that makes the scope; return the job's object path."""
    auxiliary: list[object] = []
    body = (unit, "fail", properties, auxiliary)
    answer = bus.call(systemd, "StartTransientUnit", "ssa(sv)a(sa(sv))", body)
    return str(answer[0])


class _Connection:
    """A connection to a message bus on which nothing lasts beyond the deadline."""

    def __init__(self, address: str, deadline_s: float) -> None:
        from jeepney import Parser  # noqa: PLC0415 - see the module's docstring
        from jeepney.bus import get_connectable_addresses  # noqa: PLC0415

        try:
            path: str = next(get_connectable_addresses(address))
        except RuntimeError as error:  # jeepney's word for a transport that is not a unix socket
            raise ValueError(str(error)) from error
        self._deadline_s = deadline_s
        self._parser = Parser()
        self._serial = 0
        self._signals: list[Message] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            self._connect(path)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _timed(self) -> socket.socket:
        """Give the socket with the time that is left."""
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._socket.settimeout(left_s)
        return self._socket

    def _connect(self, path: str) -> None:
        """Connect, and say who we are; the bus sees it by the socket's credentials."""
        from jeepney.auth import BEGIN, Authenticator  # noqa: PLC0415

        try:
            self._timed().connect(path)
        except BlockingIOError as error:  # the queue of a listener that accepts nobody is full
            raise TimeoutError from error
        dialogue = Authenticator()
        # In one packet: what systemd reads together with BEGIN it answers only when more comes.
        for line in dialogue:
            if line:
                self._timed().sendall(line + BEGIN)
            dialogue.feed(self._received())

    def _received(self) -> bytes:
        data = self._timed().recv(4096)
        if not data:
            raise ConnectionResetError("it closed the connection")
        return data

    def call(
        self, target: DBusAddress, method: str, signature: str | None = None, body: Any = ()
    ) -> tuple[Any, ...]:
        """Call a method and give what it returns."""
        from jeepney import HeaderFields, MessageType, new_method_call  # noqa: PLC0415

        self._serial += 1
        message = new_method_call(target, method, signature, body)
        self._timed().sendall(message.serialise(serial=self._serial))
        while True:
            answer = self._message()
            fields = answer.header.fields
            if fields.get(HeaderFields.reply_serial) != self._serial:
                self._signals.append(answer)
            elif answer.header.message_type is MessageType.error:
                text = answer.body[0] if answer.body else ""
                raise _RefusedError(str(fields.get(HeaderFields.error_name)), str(text))
            else:
                return tuple(answer.body)

    def job_result(self, job: str) -> str:
        """Wait for the end of a job of systemd's, and give its result in systemd's word."""
        from jeepney import HeaderFields  # noqa: PLC0415

        while True:
            signal = self._signals.pop(0) if self._signals else self._message()
            if signal.header.fields.get(HeaderFields.member) == "JobRemoved":
                _, path, _, result = signal.body
                if path == job:
                    return str(result)

    def _message(self) -> Message:
        """Wait for a message; raises ValueError for what is none."""
        try:
            while (message := self._parser.get_next_message()) is None:
                self._parser.add_data(self._received())
        except OSError:
            raise
        except Exception as error:  # the parser raises whatever it trips over
            raise ValueError(f"it does not speak D-Bus ({error!r})") from error
        return message
