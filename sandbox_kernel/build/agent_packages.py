"""What packages the guest needs, and whether a set of installed ones goes together.

The metadata of packages say it themselves (PEP 508 requirements with markers), read for the Python
that they are meant for, which need not be the one that runs this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

ROOTS = ("ipykernel>=6.29,<8", "cloudpickle>=3")
"""What an agent is made of, with all that these need."""
LEFT_OUT = frozenset({"debugpy", "tzdata"})
"""The guest runs without a debugger, and leaves time zones to the image; together 20 MB."""
NEEDED = ("cloudpickle>=2.2", "ipykernel>=6.17,<8", "ipython>=8", "jupyter-client>=7.4")
"""The oldest that the guest was seen to run with, where an image brings its own."""
NAMES = tuple(
    """asttokens cloudpickle comm decorator exceptiongroup executing importlib-metadata ipykernel
    ipython ipython-pygments-lexers jedi jupyter-client jupyter-core matplotlib-inline nest-asyncio
    nest-asyncio2 packaging parso pexpect platformdirs prompt-toolkit psutil ptyprocess pure-eval
    pygments python-dateutil pyzmq six stack-data tornado traitlets typing-extensions wcwidth zipp
    """.split()
)
"""Packages of which an image's own may take the place of the agent's."""


@dataclass(frozen=True)
class Installed:
    """A package as it is installed; `requires` are the lines of its metadata."""

    name: str
    version: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Unmet:
    """A requirement that a set of packages does not meet; `version` is empty for a missing one."""

    by: str
    requirement: Requirement
    version: str

    @property
    def name(self) -> str:
        """The package that is missing or of the wrong version."""
        return normal_name(self.requirement.name)


def normal_name(name: str) -> str:
    """Give the name of a package as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def markers(version: tuple[int, int], machine: str) -> dict[str, str]:
    """Give what environment markers see on CPython and Linux (PEP 508)."""
    python = "{}.{}".format(*version)
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "python_version": python,
        "sys_platform": "linux",
        "extra": "",
    }


def requirements_of(package: Installed, environment: Mapping[str, str]) -> list[Requirement]:
    """Give what a package needs in this environment; lines that nobody can read do not count."""
    found = []
    for line in package.requires:
        try:
            one = Requirement(line)
        except InvalidRequirement:
            continue
        if one.marker is None or one.marker.evaluate(dict(environment)):
            found.append(one)
    return [one for one in found if normal_name(one.name) not in LEFT_OUT]


def closure(
    roots: Iterable[str], there: Mapping[str, Installed], environment: Mapping[str, str]
) -> tuple[dict[str, Installed], list[Unmet]]:
    """Give the packages that the roots need, and what of these needs is not met."""
    found: dict[str, Installed] = {}
    unmet: list[Unmet] = []
    waiting = [("the guest", Requirement(root)) for root in roots]
    while waiting:
        by, one = waiting.pop(0)
        package = there.get(normal_name(one.name))
        if package is None or not _fits(package.version, one):
            unmet.append(Unmet(by, one, package.version if package is not None else ""))
        if package is not None and package.name not in found:
            found[package.name] = package
            by = f"{package.name} {package.version}"
            waiting += [(by, two) for two in requirements_of(package, environment)]
    return found, unmet


def _fits(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:  # a distributor's own: nobody can compare it
        return True
