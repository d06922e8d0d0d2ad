"""What a build tells while it goes on: values for whoever shows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepBegun:
    """A step begins; `number` counts from 1 to `total`."""

    number: int
    total: int
    title: str
    stage: str = ""
    """The name of the stage, where the build has several."""


@dataclass(frozen=True)
class StepOutput:
    """What RUN wrote to `stdout` or `stderr`."""

    stream: str
    data: bytes


@dataclass(frozen=True)
class StepMissed:
    """A step is not in the cache, and why."""

    reason: str


@dataclass(frozen=True)
class StepEnded:
    """A step is done: `cached` or after `wall_s`; `layer` is its DiffID, empty without files."""

    number: int
    cached: bool
    wall_s: float
    layer: str = ""
    size_bytes: int = 0


@dataclass(frozen=True)
class Warned:
    """A warning about the Dockerfile."""

    text: str


Event = StepBegun | StepOutput | StepMissed | StepEnded | Warned
