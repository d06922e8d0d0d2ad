"""`.dockerignore`: which files of the build context do not take part in the build.

A pattern that matches a folder matches all that is in it. Among the patterns that match, the
last one decides, and one with `!` before it takes a file back in.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

from sandbox_kernel.build.glob import Glob
from sandbox_kernel.errors import BuildError

FILE = ".dockerignore"
MAX_FILE_BYTES = 1 << 20

Hits = tuple[bool, ...]
"""For each pattern whether it matches a path or a folder above it."""


def ignore_files(dockerfile: str) -> tuple[str, str]:
    """Give the names of ignore files for a Dockerfile's path; the first that exists counts."""
    return f"{dockerfile}{FILE}", FILE


@dataclass(frozen=True)
class _Pattern:
    glob: Glob
    negated: bool


class Ignore:
    """Patterns in the order of their file; without any, nothing is ignored."""

    def __init__(self, patterns: Iterable[str] = ()) -> None:
        self._patterns = tuple(_pattern(one) for one in patterns)

    @classmethod
    def parse(cls, raw: bytes, file: str = FILE) -> Ignore:
        """Read an ignore file; raises BuildError, which names the line."""
        if len(raw) > MAX_FILE_BYTES:
            raise BuildError(
                f"{file} has {len(raw)} bytes", hint=f"the most is {MAX_FILE_BYTES}; use wildcards"
            )
        ignore = cls()
        patterns = []
        # Names of files are bytes, and so are their patterns.
        text = raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
        for number, line in enumerate(text.split("\n"), 1):
            stripped = line.strip()
            if line.startswith("#") or not stripped:
                continue
            try:
                patterns.append(_pattern(stripped))
            except BuildError as error:
                raise BuildError(
                    error.problem, hint=error.hint, place=f"{file}:{number}", text=stripped
                ) from error
        ignore._patterns = tuple(patterns)
        return ignore

    def __bool__(self) -> bool:
        return bool(self._patterns)

    @property
    def takes_back(self) -> bool:
        """Tell whether any pattern begins with `!`."""
        return any(pattern.negated for pattern in self._patterns)

    def ignores(self, path: str) -> bool:
        """Tell whether this path, relative to the context and with slashes, is left out."""
        hits: Hits | None = None
        parts = path.split("/")
        for length in range(1, len(parts) + 1):
            hits = self.hits("/".join(parts[:length]), hits)
        return self.decide(hits or ())

    def hits(self, path: str, above: Hits | None = None) -> Hits:
        """Match one path; `above` are the hits of the folder that it is in."""
        return tuple(
            (above is not None and above[number]) or pattern.glob.matches(path)
            for number, pattern in enumerate(self._patterns)
        )

    def decide(self, hits: Hits) -> bool:
        """Tell whether a path with these hits is left out."""
        for hit, pattern in zip(reversed(hits), reversed(self._patterns), strict=True):
            if hit:
                return not pattern.negated
        return False

    def takes_back_below(self, folder: str) -> bool:
        """Tell whether something in this folder may be taken back in; if in doubt, yes."""
        inside = folder + "/"
        return any(
            pattern.negated
            and (inside.startswith(pattern.glob.prefix) or pattern.glob.prefix.startswith(inside))
            for pattern in self._patterns
        )


def _pattern(text: str) -> _Pattern:
    stripped = text.strip()
    negated = stripped.startswith("!")
    if negated:
        stripped = stripped[1:].strip()
    if not stripped:
        raise BuildError("a pattern of nothing but !", hint="write !PATH, or remove the line")
    cleaned = posixpath.normpath(stripped).lstrip("/") or "/"
    return _Pattern(Glob(cleaned, folders=True), negated)
