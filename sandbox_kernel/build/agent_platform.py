"""Platform tags: which wheels run on a machine with a C library of some version.

Sources: PEP 600 for manylinux and its older names, PEP 656 for musllinux.
"""

from __future__ import annotations

from sandbox_kernel.build.python_facts import PythonFacts

_OLDEST_GLIBC = {"x86_64": 5}
"""The minor version of the first manylinux for a machine; of the others it is 17."""
_LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}


def platforms(facts: PythonFacts) -> list[str]:
    """Give the platform tags that fit, the best first."""
    major, minor = facts.libc_version
    if facts.libc == "musl":
        return [f"musllinux_{major}_{one}_{facts.machine}" for one in range(minor, -1, -1)]
    tags = []
    for one in range(minor, _OLDEST_GLIBC.get(facts.machine, 17) - 1, -1):
        tags.append(f"manylinux_{major}_{one}_{facts.machine}")
        if one in _LEGACY:
            tags.append(f"{_LEGACY[one]}_{facts.machine}")
    return tags
