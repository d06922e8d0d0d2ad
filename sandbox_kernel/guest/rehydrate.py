"""Carry the user's variables from one interpreter to another by pickle.

Needed after a roll back to a state whose native pools (polars', for one) did not survive the
fork: such objects still pickle, but little else works on them. The stream, which may be a pipe,
is a row of records that fail one by one: one with cwd, environment and path; one for each group
of variables that share objects; one with the states of the random generators. Functions and
classes of the notebook are pickled by value, and their globals are the new namespace itself. A
guest reads only what a guest of its own session wrote.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import pickle
import struct
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, Union

from sandbox_kernel.guest import groups

_LENGTH = struct.Struct("!I")
_CHUNK_BYTES = 1 << 30
_BUFFER_BYTES = 1 << 20
_PROTOCOL = 5
# What IPython puts into the namespace, and every guest has of its own.
_SHELLS_OWN = frozenset(
    "In Out exit quit open get_ipython _ __ ___ _i _ii _iii _ih _oh _dh _sh _exit_code".split()
)

PathOrFd = Union[str, int]
Save = Callable[[Any], None]


@dataclass(frozen=True)
class Report:
    """Which variables were carried, and which were not, with the reason in one line."""

    carried: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    def left_out_lines(self) -> list[str]:
        """Give one line for each variable that was left out."""
        return [f"{name} ({reason})" for name, reason in self.left_out]


def dump(namespace: dict[str, Any], target: PathOrFd) -> Report:
    """Write the variables of `namespace` to a path or descriptor, which is closed at the end.

    What does not pickle is left out: generators, open files, locks, connections, and what waits
    for a dead pool while it pickles.
    """
    values = {name: value for name, value in namespace.items() if _is_users(name)}
    with open(target, "wb", buffering=_BUFFER_BYTES) as file:
        _write(file, "environment", (), _plainly(_environment(values.values())))
        carried, left_out = _dump_variables(file, values, namespace)
        _write(file, "generators", (), _plainly(_generator_states()))
    return Report(tuple(carried), tuple(left_out.items()))


def load(source: PathOrFd, namespace: dict[str, Any]) -> Report:
    """Read what `dump` wrote into `namespace`; take over cwd and environment of the writer.

    A group of variables that does not load is left out as a whole. Raises EOFError if the
    stream ends early. A descriptor is closed at the end.
    """
    carried: list[str] = []
    left_out: list[tuple[str, str]] = []
    builtins = namespace.get("__builtins__")
    with open(source, "rb", buffering=_BUFFER_BYTES) as file:
        for kind, names, payload in _records(file):
            try:
                content = _Unpickler(payload, namespace).load()
                _ACCEPT[kind](content, namespace)
            except Exception as error:  # whatever a user's __setstate__ raises
                left_out += [(name, groups.reason(error)) for name in names or (kind,)]
            else:
                carried += names
    if builtins is not None:
        namespace["__builtins__"] = builtins
    return Report(tuple(carried), tuple(left_out))


def _is_users(name: str) -> bool:
    return name not in _SHELLS_OWN and not (name.startswith("__") and name.endswith("__"))


def _dump_variables(
    file: IO[bytes], values: dict[str, Any], namespace: dict[str, Any]
) -> tuple[list[str], dict[str, str]]:
    carried: list[str] = []
    try:
        pickler_type = _pickler_type(namespace)
    except ImportError:
        reason = "cloudpickle is not installed in this image"
        return carried, dict.fromkeys(values, reason)
    found = groups.sort_out(values, pickler_type)
    left_out = found.left_out
    for names in found.groups:
        group = {name: values[name] for name in names}
        try:
            _write(file, "variables", names, _by_value(pickler_type, group))
        except OSError:  # the reader is gone
            raise
        except Exception as error:  # it did pickle a moment ago; the reader leaves it out too
            left_out.update(dict.fromkeys(names, groups.reason(error)))
        else:
            carried += names
    return carried, left_out


def _pickler_type(namespace: dict[str, Any]) -> Callable[..., Any]:
    """Make a pickler that knows the namespace, and functions of it, by reference."""
    from cloudpickle import cloudpickle

    main = _main_module(namespace)

    class Pickler(cloudpickle.Pickler):
        def __init__(self, file: Any, **options: Any) -> None:
            super().__init__(file, protocol=_PROTOCOL, **options)
            self._cells: dict[int, Any] = {}

        def persistent_id(self, obj: Any) -> str | None:
            if obj is namespace:
                return "namespace"
            return "main" if obj is main else None

        def reducer_override(self, obj: Any) -> Any:
            _refuse_files(obj)
            if id(obj) in self._cells:
                return _make_cell, ()
            single = _in_one_chunk(obj)
            return super().reducer_override(obj) if single is None else single.__reduce_ex__(5)

        def _function_getnewargs(self, func: Any) -> Any:
            code, env, name, defaults, _ = super()._function_getnewargs(func)
            # cloudpickle gives each function cells of its own; here, functions that share one
            # go on sharing. They are made empty and filled later, as they may hold the function.
            self._cells.update((id(cell), cell) for cell in func.__closure__ or ())
            env = namespace if func.__globals__ is namespace else env
            return code, env, name, defaults, func.__closure__

        def _dynamic_function_reduce(self, func: Any) -> Any:
            make, args, (attributes, slots), *_ = super()._dynamic_function_reduce(func)
            slots["__closure__"] = None
            if func.__globals__ is namespace:  # they come as variables, if at all
                slots["__globals__"] = {}
            filling = [(cell, _content(cell)) for cell in func.__closure__ or ()]
            return make, args, ((attributes, slots), filling), None, None, _set_function

    return Pickler


def _main_module(namespace: dict[str, Any]) -> object:
    """Give `__main__` if the namespace is its dictionary, else an object that nobody has."""
    main = sys.modules.get("__main__")
    return main if getattr(main, "__dict__", None) is namespace else object()


def _refuse_files(obj: Any) -> None:
    # cloudpickle would carry the text that is left to read.
    if isinstance(obj, io.TextIOWrapper) and obj not in (sys.__stdout__, sys.__stderr__):
        raise pickle.PicklingError("an open file")


def _in_one_chunk(obj: Any) -> Any:
    """Give a copy of a polars frame or series that is in several chunks; None for all else.

    polars puts the chunks together before it pickles, a frame's with its pool, which may be dead;
    one series at a time does without.
    """
    if not type(obj).__module__.startswith("polars."):
        return None
    polars = sys.modules["polars"]
    if type(obj) is polars.Series and obj.n_chunks() > 1:
        return obj.rechunk()
    if type(obj) is polars.DataFrame and max(obj.n_chunks("all"), default=1) > 1:
        return polars.DataFrame([series.rechunk() for series in obj.get_columns()])
    return None


def _make_cell() -> types.CellType:
    return types.CellType()


def _content(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # it is empty
        return ()


def _set_function(function: Any, state: tuple[Any, list[tuple[Any, tuple[Any, ...]]]]) -> None:
    from cloudpickle import cloudpickle

    cloudpickle._function_setstate(function, state[0])
    for cell, content in state[1]:
        if content:
            cell.cell_contents = content[0]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], namespace: dict[str, Any]) -> None:
        super().__init__(file)
        self._namespace = namespace

    def persistent_load(self, pid: Any) -> Any:
        return self._namespace if pid == "namespace" else sys.modules["__main__"]


# ---- what is beside the variables


def _environment(values: Iterable[Any]) -> dict[str, Any]:
    roots = {v.__name__.split(".")[0] for v in values if type(v) is types.ModuleType}
    return {
        "cwd": _cwd(),
        "environ": dict(os.environ),
        "path": list(sys.path),
        # `import a.b` binds only a, which has b as attribute once that was imported.
        "modules": [
            name
            for name in list(sys.modules)
            if name.split(".")[0] in roots and "." in name and "._" not in name
        ],
    }


def _cwd() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # it was removed
        return None


def _restore_environment(content: dict[str, Any], _namespace: dict[str, Any]) -> None:
    if content["cwd"]:
        with contextlib.suppress(OSError):
            os.chdir(content["cwd"])
    for name in set(os.environ) - set(content["environ"]):
        del os.environ[name]
    os.environ.update(content["environ"])
    sys.path[:] = content["path"] + [path for path in sys.path if path not in content["path"]]
    for name in content["modules"]:
        if name not in sys.modules:
            # Not every entry is a module that can be imported: some packages make them up.
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _generator_states() -> dict[str, Any]:
    states: dict[str, Any] = {}
    if "random" in sys.modules:
        states["random"] = sys.modules["random"].getstate()
    if "numpy.random" in sys.modules:
        states["numpy.random"] = sys.modules["numpy.random"].get_state()
    return states


def _restore_generators(content: dict[str, Any], _namespace: dict[str, Any]) -> None:
    if "random" in content:
        importlib.import_module("random").setstate(content["random"])
    if "numpy.random" in content:
        importlib.import_module("numpy.random").set_state(content["numpy.random"])


def _restore_variables(content: dict[str, Any], namespace: dict[str, Any]) -> None:
    namespace.update(content)


_ACCEPT: dict[str, Callable[[dict[str, Any], dict[str, Any]], None]] = {
    "environment": _restore_environment,
    "variables": _restore_variables,
    "generators": _restore_generators,
}


# ---- the stream: a record is a chunk of JSON, chunks of pickle, and an empty chunk


def _plainly(content: Any) -> Save:
    return lambda sink: pickle.dump(content, sink, _PROTOCOL)


def _by_value(pickler_type: Callable[..., Any], content: Any) -> Save:
    return lambda sink: pickler_type(sink).dump(content)


def _write(file: IO[bytes], kind: str, names: Iterable[str], save: Save) -> None:
    sink = _Chunks(file)
    sink.write(json.dumps([kind, list(names)]).encode("ascii"))
    try:
        save(sink)
    finally:
        file.write(_LENGTH.pack(0))


def _records(file: IO[bytes]) -> Iterator[tuple[str, list[str], IO[bytes]]]:
    """Yield kind, names and payload of each record up to the last kind."""
    kind = ""
    while kind != "generators":
        (length,) = _LENGTH.unpack(_exactly(file, _LENGTH.size))
        kind, names = json.loads(_exactly(file, length))
        payload = _Payload(file)
        yield kind, names, io.BufferedReader(payload, _BUFFER_BYTES)
        payload.drain()


def _exactly(file: IO[bytes], length: int) -> bytes:
    data = file.read(length)
    if len(data) != length:
        raise EOFError("the stream of variables ends early")
    return data


class _Chunks:
    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK_BYTES):
            piece = view[start : start + _CHUNK_BYTES]
            self._file.write(_LENGTH.pack(len(piece)))
            self._file.write(piece)
        return len(view)


class _Payload(io.RawIOBase):
    """The chunks of one record as a file, up to and with the empty one."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._left_bytes = 0
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._left_bytes and not self._ended:
            (self._left_bytes,) = _LENGTH.unpack(_exactly(self._file, _LENGTH.size))
            self._ended = not self._left_bytes
        wanted = min(len(buffer), self._left_bytes)
        buffer[:wanted] = _exactly(self._file, wanted)
        self._left_bytes -= wanted
        return wanted

    def drain(self) -> None:
        """Read what an unpickler that failed left behind."""
        rest = bytearray(_BUFFER_BYTES)
        while self.readinto(rest):
            continue
