"""An agent from what is installed here, for an image with a Python like the one that runs this."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from sandbox_kernel.build.agent_files import Files, is_wanted, merged
from sandbox_kernel.build.agent_packages import ROOTS, Installed, closure, markers, normal_name
from sandbox_kernel.build.agent_platform import platforms
from sandbox_kernel.build.python_facts import PythonFacts, own_facts


def installed_files(facts: PythonFacts) -> Files | None:
    """Give the files of an agent; None where ours would not run there, or cannot be told apart.

    That is another version, machine or C library, a package of a distributor without a list of
    its files, or one that is installed for development.
    """
    own = own_facts()
    if (own.version, own.machine, own.libc) != (facts.version, facts.machine, facts.libc):
        return None
    known = _distributions()
    there = {name: _installed(name, one) for name, one in known.items()}
    found, unmet = closure(ROOTS, there, markers(facts.version, facts.machine))
    if unmet:
        return None
    # What was built here fits where the C library is as new.
    fitting = {*platforms(facts), "any"}
    if facts.libc_version >= own.libc_version:
        fitting.add(f"linux_{facts.machine}")
    parts = [_files(known[name], fitting) for name in sorted(found)]
    complete = [part for part in parts if part is not None]
    return merged(complete) if len(complete) == len(parts) else None


def _distributions() -> dict[str, metadata.Distribution]:
    """Give what is installed; of two with one name the one that is imported, which comes first."""
    found: dict[str, metadata.Distribution] = {}
    for one in metadata.distributions():
        name = one.metadata["Name"]
        if name:
            found.setdefault(normal_name(name), one)
    return found


def _installed(name: str, one: metadata.Distribution) -> Installed:
    return Installed(name, one.version, tuple(one.requires or ()))


def _files(one: metadata.Distribution, fitting: set[str]) -> Files | None:
    tags = set(_tags(one))
    if one.files is None or not tags & fitting or _is_editable(one):
        return None
    found: Files = {}
    for path in one.files:
        name = path.as_posix()
        if is_wanted(name):
            place = Path(str(one.locate_file(path)))
            if not place.is_file():  # it is not what its installer left
                return None
            found[name] = place.read_bytes()
    return found


def _tags(one: metadata.Distribution) -> Iterator[str]:
    """Give the platforms that the wheel was for."""
    for line in (one.read_text("WHEEL") or "").splitlines():
        key, _, value = line.partition(":")
        if key == "Tag":
            yield value.strip().split("-")[-1]


def _is_editable(one: metadata.Distribution) -> bool:
    try:
        said = json.loads(one.read_text("direct_url.json") or "{}")
    except ValueError:
        return True
    return bool(said.get("dir_info", {}).get("editable"))
