"""The files of an agent: what the guest needs of a package, from its wheel or as it is installed.

Both ways give the same files for the same versions. Left out is what installers write, and what
would be of use to developers of the package only.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from email.parser import HeaderParser
from pathlib import Path

from sandbox_kernel.build.agent_packages import Installed, normal_name
from sandbox_kernel.errors import ImageError

MAX_FILES = 50_000
MAX_BYTES = 512 << 20
"""Of one package, or of all bytecode."""
METADATA = "METADATA"

Files = dict[str, bytes]
"""Contents by path, relative and with slashes."""

_LICENSES = ("LICEN", "COPYING", "NOTICE", "AUTHORS")
_TESTS = frozenset({"test", "tests"})


def is_wanted(path: str) -> bool:
    """Tell whether a file of a package, by its path in site-packages, goes into an agent."""
    parts = path.split("/")
    if ".." in parts or "" in parts or parts[0].endswith(".data"):
        return False
    if parts[0].endswith(".dist-info"):
        name = parts[-1].upper()
        return parts[1:] == [METADATA] or "licenses" in parts or name.startswith(_LICENSES)
    return not (path.endswith(".pyc") or _TESTS.intersection(parts[1:-1]))


def read_wheel(path: Path) -> tuple[Installed, Files]:
    """Give a package and its files from a wheel; raises ImageError where it is none."""
    try:
        with zipfile.ZipFile(path) as wheel:
            entries = [one for one in wheel.infolist() if not one.is_dir()]
            size_bytes = sum(one.file_size for one in entries)
            if len(entries) > MAX_FILES or size_bytes > MAX_BYTES:
                raise ImageError(f"the wheel {path.name} is too large: {size_bytes} bytes")
            files = {
                name: wheel.read(one)
                for one in entries
                if is_wanted(name := _place_of(one.filename))
            }
    except (zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError) as error:
        raise ImageError(f"the wheel {path.name} cannot be read: {error}") from error
    about = next((name for name in files if name.endswith(f".dist-info/{METADATA}")), None)
    if about is None:
        raise ImageError(f"the wheel {path.name} has no metadata")
    return read_metadata(files[about].decode("utf-8", "replace")), files


def _place_of(name: str) -> str:
    """Give where an entry of a wheel is installed (binary distribution format, `.data`)."""
    parts = name.split("/")
    if parts[0].endswith(".data") and len(parts) > 2 and parts[1] in ("purelib", "platlib"):
        return "/".join(parts[2:])
    return name


def read_metadata(text: str) -> Installed:
    """Give what the metadata of a package say of it."""
    message = HeaderParser().parsestr(text)
    requires = tuple(str(line) for line in message.get_all("Requires-Dist", ()))
    return Installed(normal_name(message.get("Name", "")), message.get("Version", ""), requires)


def packages_in(folder: Path) -> dict[str, Installed]:
    """Give the packages of an agent's folder, by name."""
    texts = (path.read_text("utf-8", "replace") for path in folder.glob(f"*.dist-info/{METADATA}"))
    return {found.name: found for found in map(read_metadata, texts)}


def write_files(folder: Path, files: Files) -> None:
    """Write files below a folder; modes are what a layer needs, whatever the umask is."""
    made: set[Path] = {folder}
    for name, content in sorted(files.items()):
        path = folder / name
        _make_folders(path.parent, made)
        path.write_bytes(content)
        path.chmod(0o644)


def _make_folders(path: Path, made: set[Path]) -> None:
    if path not in made:
        _make_folders(path.parent, made)
        path.mkdir(exist_ok=True)
        path.chmod(0o755)
        made.add(path)


def merged(parts: Iterable[Files]) -> Files:
    """Put the files of several packages together; raises ImageError if two have the same."""
    found: Files = {}
    for part in parts:
        for name, content in part.items():
            if found.setdefault(name, content) != content:
                raise ImageError(f"two packages of the agent have the file {name}")
    return found
