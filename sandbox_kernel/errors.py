"""The exception tree: what can go wrong that is not the end of a cell.

How a cell ended is never an exception, it is a value (`model.Outcome`).

SandboxError
├── ConfigError       a value that somebody wrote is wrong: limit, option, line, verb
├── HostError         this host cannot enforce a limit or a protection
├── ImageError        an image is missing or cannot be used
│   └── BuildError    a Dockerfile, its context or a step of it cannot be used
├── LaunchError       a step of building a container failed
├── ProtocolError     a guest broke the wire protocol
│   └── GuestGone     a guest's process ended
└── SessionLost       init or the head died, and the state with it
"""

from __future__ import annotations


class SandboxError(Exception):
    """The root of the tree; `hint` is one line that says what to do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Give the message and, after it, the remedy."""
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ConfigError(SandboxError):
    """A value that somebody wrote is wrong; the message names it and what would be right."""


class HostError(SandboxError):
    """This host cannot enforce a limit or a protection; the message names which."""


class ImageError(SandboxError):
    """An image is missing or cannot be used."""


class BuildError(ImageError):
    """A Dockerfile, its build context or one of its steps cannot be used.

    `problem` is the message alone. `place` is `file:line` and `text` the line itself; both are
    empty where the error belongs to no line.
    """

    def __init__(self, problem: str, *, hint: str = "", place: str = "", text: str = "") -> None:
        message = f"{place}: {problem}" if place else problem
        super().__init__(f"{message}\n    {text}\n" if text else message, hint=hint)
        self.problem = problem
        self.place = place
        self.text = text


class LaunchError(SandboxError):
    """A step of building a container failed before any code of the user ran.

    `step` describes the step as the plan words it.
    """

    def __init__(self, step: str, cause: str, *, hint: str = "") -> None:
        super().__init__(f"{step}: {cause}", hint=hint)
        self.step = step
        self.cause = cause


class ProtocolError(SandboxError):
    """A guest broke the wire protocol; its cell is killed and rolled back."""


class GuestGone(ProtocolError):  # noqa: N818 - what happened, not a mistake
    """A guest's process ended, or let go of its link."""


class SessionLost(SandboxError):  # noqa: N818 - a state that users read in their notebook
    """Init or the head of the session died, and the variables with it."""
