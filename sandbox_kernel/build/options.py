"""What a build is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandbox_kernel.build.base import Pull
from sandbox_kernel.build.run import JobLimits
from sandbox_kernel.image.platform import Platform
from sandbox_kernel.image.reference import Reference


@dataclass(frozen=True)
class BuildOptions:
    """The options of `image build`."""

    context: Path
    dockerfile: Path
    tags: tuple[Reference, ...] = ()
    arguments: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    target: str = ""
    platform: Platform | None = None
    use_cache: bool = True
    explain: bool = False
    network: str = "none"
    """What RUN has unless it says otherwise: `none` or `host`."""
    secrets: Mapping[str, Path] = field(default_factory=dict)
    """Files with secrets, by id."""
    limits: JobLimits = field(default_factory=JobLimits)
    epoch_s: int = 0
    """No file and no date of the image is newer, so that it is the same on every day."""
    pull: Pull | None = None
