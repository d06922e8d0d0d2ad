"""Why a step is not in the cache: compare it with the last build of the same Dockerfile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sandbox_kernel.build.cache import Key
from sandbox_kernel.image.media import digest_of
from sandbox_kernel.image.store import Store

SHOWN_FILES = 5
KEPT_FILES = 10_000
"""Above this, single files are not remembered."""
SHOWN_CHARACTERS = 80

NEVER = "there is no record of a build of it"
_AFTER = "it comes after a change"
_GONE = "it no longer comes after"
_BASE = "its base image has changed"


@dataclass(frozen=True)
class Step:
    """A step that changes files, as it stands in the Dockerfile."""

    stage: int
    text: str
    later: tuple[str, ...] = ()
    """The texts of the stage's steps behind it."""


@dataclass
class _Stage:
    """What is known of one stage: the steps of the last build, and those of this one."""

    before: list[Mapping[str, Any]] = field(default_factory=list)
    now: list[Mapping[str, Any]] = field(default_factory=list)
    at: int = 0
    """Where in `before` the next step is expected."""
    is_done: bool = False

    def counterpart(self, text: str) -> int | None:
        """Give where the step of this text stood; among several, the one as far as this."""
        count = sum(one["text"] == text for one in self.now)
        found = [at for at, one in enumerate(self.before) if one["text"] == text]
        return found[count] if count < len(found) else None


class LastBuild:
    """The steps of the build before, by stage, and those of this one."""

    def __init__(self, store: Store, name: str) -> None:
        """Read what the last build left.

        `name` is what makes two builds comparable: the paths of Dockerfile and context.
        """
        self._store = store
        self._record = digest_of(f"last build\0{name}".encode())
        record = store.records.get(self._record, used=False)
        self._stages = _read(record.value.get("stages") if record else None)
        self._changes: dict[str, str] = {}
        """By the key of a step: why those built on it are not what they were."""

    def close(self) -> None:
        """Write the steps of this build; those that it did not reach stay as they were."""
        stages = {}
        for number, stage in self._stages.items():
            rest = [] if stage.is_done else stage.before[stage.at :]
            stages[str(number)] = [*stage.now, *rest]
        self._store.records.put(self._record, {"digests": [], "stages": stages})

    def why(self, step: Step, key: Key) -> str:
        """Say in what a step differs from the last build; empty if it does not.

        Each step is asked once, in order, whether it is in the cache or not.
        """
        stage = self._stages.setdefault(step.stage, _Stage())
        reason = self._reason(stage, step, key)
        if reason:
            self._changes[key.digest] = _inherited(reason, step)
        return reason

    def note(self, step: Step, key: Key) -> None:
        """Remember a step of this build, which is done."""
        files = dict(key.files) if len(key.files) <= KEPT_FILES else {}
        stage = self._stages[step.stage]
        at = stage.counterpart(step.text)
        stage.at = 1 + (stage.at if at is None else at)
        stage.is_done = not step.later
        stage.now.append(
            {"text": step.text, "parent": key.parent, "parts": dict(key.parts), "files": files}
        )

    def _reason(self, stage: _Stage, step: Step, key: Key) -> str:
        if not stage.before:
            return NEVER
        at = stage.counterpart(step.text)
        if at is None:
            old = stage.before[stage.at]["text"] if stage.at < len(stage.before) else ""
            if old and old not in step.later:
                return f"the instruction has changed, it was: {_short(old)}"
            return "it is new in this Dockerfile"
        before = stage.before[at]
        if before["parent"] == key.parent:
            return difference(before["parts"], before["files"], key)
        return self._changes.get(key.parent) or _moved(stage, at)


def _moved(stage: _Stage, at: int) -> str:
    """Give why a step has another parent, though nothing below it is new or has changed."""
    texts = [one["text"] for one in stage.now]
    gone = next((one["text"] for one in stage.before[:at] if one["text"] not in texts), None)
    return _BASE if gone is None else f"{_GONE}: {_short(gone)}"


def _inherited(reason: str, step: Step) -> str:
    """Give the reason of those behind a step that is not in the cache for `reason`."""
    if reason.startswith((NEVER, _AFTER, _GONE, _BASE)):
        return reason
    return f"{_AFTER}: {_short(step.text)}"


def difference(parts: Mapping[str, str], files: Mapping[str, str], key: Key) -> str:
    """Say in which part a key differs from one before; empty if in none."""
    for name, value in key.parts:
        old = parts.get(name)
        if old == value:
            continue
        if name == "files" or name.startswith("mount "):
            return changed_files(files, key.files)
        if name == "environment":
            return changed_variables(old or "", value)
        was = f"it was: {_short(old)}" if old else "it was not set"
        return f"its {name} has changed, {was}"
    return ""


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Name the files that differ."""
    found = [f"{path} changed" for path in now if path in before and before[path] != now[path]]
    found += [f"{path} is new" for path in now if path not in before]
    found += [f"{path} is gone" for path in before if path not in now]
    if not found or not before:
        return "its files have changed"
    more = len(found) - SHOWN_FILES
    return ", ".join(found[:SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")


def changed_variables(before: str, now: str) -> str:
    """Name the variables that differ; each text has one NAME=VALUE after the other, NUL between."""
    old, new = (
        dict(line.split("=", 1) for line in text.split("\0") if "=" in line)
        for text in (before, now)
    )
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    return f"the value of {', '.join(names)} has changed"


def _read(stages: object) -> dict[int, _Stage]:
    """Read a record; of one that another version wrote nothing is taken."""
    kinds = {"text": str, "parent": str, "parts": dict, "files": dict}
    found = {}
    for number, steps in stages.items() if isinstance(stages, dict) else ():
        known = isinstance(steps, list) and all(
            isinstance(one, dict) and all(isinstance(one.get(k), t) for k, t in kinds.items())
            for one in steps
        )
        if known and number.isdecimal():
            found[int(number)] = _Stage(steps)
    return found


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
