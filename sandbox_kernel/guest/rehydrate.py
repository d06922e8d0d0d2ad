"""Carry the user's variables from one interpreter to another by pickle.

Needed after a roll back to a state whose native pools (polars', for one) did not survive the
fork: such objects still pickle, but little else works on them. The stream is a row of records,
each a row of chunks, so that a record that does not load costs only the variables in it: one
with cwd, environment and path; one for each group of variables that share objects; one with
the states of the random generators. Functions and classes of the notebook are pickled by value,
and their globals are the new namespace itself. A guest reads only what a guest of its own
session wrote.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import struct
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, Any, Union, cast

_CHUNK = struct.Struct("!I")
_CHUNK_BYTES = 1 << 20
_PROTOCOL = 5
# What IPython puts into the namespace and every guest has of its own.
_SHELLS_OWN = frozenset(
    "In Out exit quit open get_ipython display _ __ ___ _i _ii _iii _ih _oh _dh _sh _exit_code".split()
)
# Sharing one of these is no bond: they are immutable, or are found again by their names.
_UNBOUND = (str, bytes, int, float, complex, types.CodeType, types.ModuleType)

PathOrFd = Union[str, int]  # noqa: UP007 - evaluated, and Python 3.9 knows no other way
Namespace = dict  # noqa: PLW0127 - a readable name for annotations only


@dataclass(frozen=True)
class Report:
    """Which variables were carried, and which not, with the reason in one line."""

    carried: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    def left_out_lines(self) -> list[str]:
        """Give one line for each variable that was left out."""
        return [f"{name} ({reason})" for name, reason in self.left_out]


def dump(namespace: dict[str, Any], target: PathOrFd) -> Report:
    """Write the variables of `namespace` to a path or descriptor, which is closed at the end.

    What does not pickle is left out: generators, open files, locks, connections. May hang where
    an object's own pickling needs a pool that is dead, so the caller must set a time limit.
    """
    values = {name: value for name, value in namespace.items() if _is_users(name)}
    with open(target, "wb", buffering=_CHUNK_BYTES) as file:
        _write(file, lambda record: pickle.dump(_environment(), record, _PROTOCOL))
        try:
            pickler_type = _pickler_type(namespace)
        except ImportError:
            reason = "cloudpickle is not installed in this image"
            return Report((), tuple((name, reason) for name in values))
        groups, left_out = _groups(values, pickler_type)
        for names in groups:
            group = {name: values[name] for name in names}
            _write(file, lambda record, group=group: pickler_type(record).dump(group))  # type: ignore[misc]
        states = _generator_states(namespace)
        _write(file, lambda record: pickle.dump(states, record, _PROTOCOL))
    carried = tuple(name for names in groups for name in names)
    return Report(carried, tuple(left_out.items()))


def load(source: PathOrFd, namespace: dict[str, Any]) -> Report:
    """Read what `dump` wrote into `namespace`, and become in cwd and environment like its writer.

    A group of variables that does not load is left out as a whole. Raises EOFError if the
    stream ends early.
    """
    carried: list[str] = []
    left_out: list[tuple[str, str]] = []
    with open(source, "rb", buffering=_CHUNK_BYTES) as file:
        _restore_environment(_read(file, namespace))
        while (record := _read(file, namespace)) is not None:
            if isinstance(record, _Unreadable):
                left_out.append((record.names or "variables", record.reason))
            elif isinstance(record, _States):
                _restore_generators(record)
                break
            else:
                namespace.update(record)
                carried += record
    return Report(tuple(carried), tuple(left_out))


class _States(dict):  # type: ignore[type-arg]
    """States of random generators by module name; the last record."""


@dataclass(frozen=True)
class _Unreadable:
    names: str
    reason: str


def _is_users(name: str) -> bool:
    return name not in _SHELLS_OWN and not (name.startswith("__") and name.endswith("__"))
