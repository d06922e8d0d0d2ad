"""What is known of the Python of an image: asked of itself, in a container, and not trusted.

The answer is one line of JSON on standard output, the last one, since an image may have a
`sitecustomize` that prints. It is bounded, checked field by field, and decides nothing but which
packages the guest gets beside those of the image.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sandbox_kernel.build.agent_packages import NAMES, Installed
from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.fields import Fields, parse_object

MINIMUM = (3, 9)
MAX_ANSWER_BYTES = 1 << 20
MAX_REQUIREMENTS = 400
"""Of one package, with all of its extras."""
MODULES = (
    "array ctypes fcntl hashlib multiprocessing pdb resource select socket sqlite3 ssl termios"
    " unicodedata uuid zlib"
).split()
"""Standard modules that IPython and the guest need, and that small builds are known to lack."""
LIBRARY = "libstdc++.so.6"
"""What ZeroMQ is linked to; wheels for musl bring it along."""
REMEDY = "install a complete Python 3.9 or newer in it, or build on an image such as python:3-slim"

_RELEASE = re.compile(r"(\d{1,3})\.(\d{1,4})(?:\.\S{0,40})?", re.ASCII)
_WORD = re.compile(r"[A-Za-z0-9_.+!-]{1,100}", re.ASCII)

SCRIPT = """\
import sys
sys.path.pop(0)
import json, os
def libc():
    try:
        return os.confstr("CS_GNU_LIBC_VERSION").split()
    except (AttributeError, ValueError, OSError):
        pass
    import glob, subprocess
    for loader in glob.glob("/lib/ld-musl-*.so.1"):
        said = subprocess.run([loader], stderr=subprocess.PIPE).stderr.decode("ascii", "replace")
        for line in said.splitlines():
            if line.startswith("Version "):
                return ["musl", line.split()[1]]
        return ["musl", "1.1"]
    return ["", ""]
def packages(wanted):
    from importlib import metadata
    found = {}
    for one in metadata.distributions():
        name = (one.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-")
        if name in wanted and name not in found:
            found[name] = {"name": name, "version": one.version, "requires": one.requires or []}
    return list(found.values())
lacks = {}
for name in sys.argv[1].split(","):
    try:
        __import__(name)
    except Exception as error:
        lacks[name] = str(error)[:200]
if libc()[0] == "glibc" and "ctypes" not in lacks:
    import ctypes
    try:
        ctypes.CDLL(sys.argv[3])
    except OSError as error:
        lacks[sys.argv[3]] = str(error)[:200]
print(json.dumps({
    "implementation": sys.implementation.name,
    "version": "%d.%d.%d" % sys.version_info[:3],
    "prefix": sys.prefix,
    "machine": os.uname().machine,
    "is_64_bit": sys.maxsize > 2 ** 32,
    "has_gil": "t" not in getattr(sys, "abiflags", ""),
    "libc": libc(),
    "lacks": lacks,
    "packages": packages(sys.argv[2].split(",")),
}))
"""
"""Runs on any Python 3; its arguments are modules and a library to try, and packages to report."""

RunPython = Callable[[Sequence[str]], bytes]
"""Runs the image's interpreter with these arguments, as a cell would run it; gives its stdout.

Raises ImageError, with the end of stderr, where it does not end with 0.
"""


@dataclass(frozen=True)
class PythonFacts:
    """The Python of an image."""

    version: tuple[int, int]
    machine: str
    libc: str
    """`glibc` or `musl`."""
    libc_version: tuple[int, int]
    full_version: str = ""
    prefix: str = ""
    packages: tuple[Installed, ...] = ()
    """Those of the image that the guest uses too."""

    @property
    def python(self) -> str:
        """The version as `3.11`."""
        return "{}.{}".format(*self.version)

    @property
    def libc_name(self) -> str:
        """The C library as `glibc 2.36`."""
        return "{} {}.{}".format(self.libc, *self.libc_version)


def ask_python(reference: str, run_python: RunPython) -> PythonFacts:
    """Ask an image's Python what it is; raises ImageError where it is of no use to us."""
    try:
        answer = run_python(["-c", SCRIPT, ",".join(MODULES), ",".join(NAMES), LIBRARY])
    except ImageError as error:
        raise ImageError(
            f"the Python of image {reference!r} does not run: {error.message}", hint=REMEDY
        ) from error
    try:
        return parse_facts(reference, answer)
    except ImageError as error:
        raise ImageError(error.message, hint=error.hint or REMEDY) from None


def parse_facts(reference: str, answer: bytes) -> PythonFacts:
    """Read what SCRIPT printed; raises ImageError where that Python is of no use to us."""
    what = f"what the Python of image {reference!r} says of itself"
    if len(answer) > MAX_ANSWER_BYTES:
        raise ImageError(f"{what} has more than {MAX_ANSWER_BYTES} bytes")
    fields = Fields(parse_object(answer.strip().rpartition(b"\n")[2], what), what)
    full_version = _word(fields, "version")
    version = _release(full_version, f"{what}, version")
    if version < MINIMUM:
        raise _unusable(reference, f"is {full_version}, too old: cells need 3.9 or newer")
    _check_kind(reference, fields)
    lacks = fields.pairs("lacks")
    if lacks:
        names = ", ".join(name for name, _ in lacks)
        hint = f"install {LIBRARY} in it (Debian: libstdc++6)" if names == LIBRARY else REMEDY
        raise _unusable(reference, f"lacks what cells need, {names}: {lacks[0][1]}", hint)
    libc = fields.texts("libc")
    if len(libc) != 2 or libc[0] not in ("glibc", "musl"):
        raise _unusable(reference, "runs on a C library that is neither glibc nor musl")
    return PythonFacts(
        version=version,
        machine=_word(fields, "machine"),
        libc=libc[0],
        libc_version=_release(libc[1], f"{what}, libc"),
        full_version=full_version,
        prefix=fields.text("prefix")[:4096],
        packages=_packages(fields),
    )


def _check_kind(reference: str, fields: Fields) -> None:
    if (name := fields.text("implementation")) != "cpython":
        raise _unusable(reference, f"is {name[:100]}, not CPython")
    if not fields.flag("is_64_bit"):
        raise _unusable(reference, "is a 32-bit build")
    if not fields.flag("has_gil"):
        raise _unusable(reference, "is a free-threaded build, whose processes cannot be forked")
    ours = os.uname().machine
    if (machine := fields.text("machine")) != ours:
        raise _unusable(reference, f"is for {machine[:100]!r}, and this machine is {ours}")


def _unusable(reference: str, why: str, hint: str = REMEDY) -> ImageError:
    return ImageError(f"the Python of image {reference!r} {why}", hint=hint)


def _packages(fields: Fields) -> tuple[Installed, ...]:
    found = []
    for one in fields.objects("packages"):
        requires = one.texts("requires")
        if one.text("name") in NAMES and len(requires) <= MAX_REQUIREMENTS:
            found.append(Installed(one.text("name"), _word(one, "version"), requires))
    return tuple(found)


def _word(fields: Fields, key: str) -> str:
    text = fields.text(key)
    if _WORD.fullmatch(text) is None:
        raise ImageError(f"{fields.what}: {key} is {text[:100]!r}")
    return text


def _release(text: str, what: str) -> tuple[int, int]:
    """Give the first two numbers of a version."""
    known = _RELEASE.fullmatch(text)
    if known is None:
        raise ImageError(f"{what}: {text[:100]!r} is not a version")
    return int(known[1]), int(known[2])


def own_facts() -> PythonFacts:
    """Give the facts of the Python that runs this."""
    name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    known = _RELEASE.match(version) if name == "glibc" else None
    return PythonFacts(
        version=sys.version_info[:2],
        machine=os.uname().machine,
        libc=name if known else "",
        libc_version=(int(known[1]), int(known[2])) if known else (0, 0),
        full_version=".".join(map(str, sys.version_info[:3])),
        prefix=sys.prefix,
    )
