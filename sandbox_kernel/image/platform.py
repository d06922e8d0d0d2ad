"""Platforms of images, in Go's words: `linux/amd64`, `linux/arm/v7`."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.fields import Fields
from sandbox_kernel.model import Json

# What the kernel calls the machine, and what Go does.
_MACHINES = {
    "x86_64": ("amd64", ""),
    "aarch64": ("arm64", "v8"),
    "armv8l": ("arm", "v7"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "i686": ("386", ""),
    "i586": ("386", ""),
    "loongarch64": ("loong64", ""),
}
# What a missing variant means.
_PLAIN = {"amd64": "v1", "arm64": "v8", "arm": "v7"}


@dataclass(frozen=True)
class Platform:
    """What an image was made for."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    @classmethod
    def host(cls) -> Platform:
        """Give this machine's platform."""
        machine = os.uname().machine
        architecture, variant = _MACHINES.get(machine, (machine, ""))
        return cls("linux", architecture, variant)

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read `os/architecture[/variant]`; raises ImageError."""
        parts = text.split("/")
        if len(parts) not in {2, 3} or not all(parts):
            raise ImageError(f"{text!r} is not a platform", hint="write for example linux/amd64")
        return cls(*parts)

    @classmethod
    def read(cls, fields: Fields) -> Platform:
        """Read the object of a descriptor or a config; raises ImageError."""
        return cls(fields.text("os"), fields.text("architecture"), fields.text("variant"))

    def as_json(self) -> Json:
        """Give the platform as it stands in a document."""
        found: Json = {"os": self.os, "architecture": self.architecture}
        return {**found, "variant": self.variant} if self.variant else found

    def takes(self, other: Platform) -> int:
        """Tell how well this platform runs images of another: 0 not at all, else more is better.

        A processor runs what was made for older variants of it.
        """
        if (self.os, self.architecture) != (other.os, other.architecture):
            return 0
        mine, theirs = self._level(), other._level()
        return theirs + 1 if theirs <= mine else 0

    def _level(self) -> int:
        variant = self.variant or _PLAIN.get(self.architecture, "v0")
        digits = variant.removeprefix("v").partition(".")[0]
        return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 4 else 0
