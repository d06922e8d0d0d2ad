"""What `RUN --mount` shows to one command and no layer keeps: caches, secrets, files of others."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.copy import Destination, prepare
from sandbox_kernel.build.files import FileSteps, short_digest
from sandbox_kernel.build.mounts import Mount
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.build.stages import Stage
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.cache_mounts import Look
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.view import View
from sandbox_kernel.model import Bind


@dataclass
class Shown:
    """What one RUN is shown for its time, and what of it counts for the cache."""

    binds: list[Bind] = field(default_factory=list)
    tmpfs: list[tuple[str, int]] = field(default_factory=list)
    env: list[tuple[str, str]] = field(default_factory=list)
    parts: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


class RunMounts:
    """Puts together what the mounts of a RUN show."""

    def __init__(self, store: Store, options: BuildOptions, files: FileSteps) -> None:
        self._store = store
        self._options = options
        self._files = files

    def depend(self, run: ins.Run, mounts: tuple[Mount, ...], stage: Stage) -> Shown:
        """Give what of the mounts is part of the step's key; nothing is shown yet."""
        shown = Shown()
        with ExitStack() as stack:
            for mount in mounts:
                if mount.type == "bind":
                    transfer = prepare(
                        _copy_of(run, mount),
                        self._files.tree(mount.stage, stage, run),
                        View(()),
                        stack.enter_context(self._files.scratch()),
                    )
                    content = transfer.content()
                    shown.parts.append((f"mount {mount.target}", content.digest))
                    above = f"{mount.stage}:" if mount.stage else ""
                    shown.files |= {above + name: one for name, one in content.files.items()}
        return shown

    def show(
        self, run: ins.Run, mounts: tuple[Mount, ...], stage: Stage, stack: ExitStack
    ) -> Shown:
        """Prepare the mounts; what was made for them goes with `stack`. Raises BuildError."""
        shown = Shown()
        for mount in mounts:
            if mount.type == "tmpfs":
                shown.tmpfs.append((mount.target, mount.size_bytes or 0))
            elif mount.type == "secret":
                self._secret(mount, shown, stack)
            elif mount.type == "cache":
                folder = self._cache(mount, stack)
                if mount.source:
                    raise BuildError(
                        "--mount=type=cache with source is not supported",
                        hint="leave source and from out: the cache begins empty",
                    )
                shown.binds.append(Bind(str(folder), mount.target, mount.read_only))
            else:
                source = self._copied(run, mount, stage, stack)
                shown.binds.append(Bind(str(source), mount.target, mount.read_only))
        return shown

    def _secret(self, mount: Mount, shown: Shown, stack: ExitStack) -> None:
        path = self._options.secrets.get(mount.id)
        if path is None:
            if mount.required:
                raise BuildError(
                    f"the secret {mount.id} is required and was not given",
                    hint=f"build --secret id={mount.id},src=FILE",
                )
            return
        if mount.uid or mount.gid:
            raise BuildError(
                "--mount=type=secret with uid or gid is not supported",
                hint="give it mode=0444: no other step sees it",
            )
        try:
            value = path.read_bytes()
        except OSError as error:
            raise BuildError(
                f"the secret {mount.id} cannot be read: {error.strerror}",
                hint=f"look at {path}, which --secret names",
            ) from error
        if mount.env:
            shown.env.append((mount.env, os.fsdecode(value)))
        if mount.target:
            scratch = stack.enter_context(self._files.scratch())
            # The step sees a copy with the permissions of the file.
            copy = scratch / short_digest(mount.id + mount.target)
            copy.touch(0o600)
            copy.write_bytes(value)
            copy.chmod(0o400 if mount.mode is None else mount.mode & 0o777)
            shown.binds.append(Bind(str(copy), mount.target))

    def _cache(self, mount: Mount, stack: ExitStack) -> Path:
        """Give the folder of a cache: alone where it is locked, another one where private."""
        name = short_digest(mount.id)
        if mount.sharing == "locked":
            stack.enter_context(self._store.locked(f"cache-mount-{name}"))
        mode = 0o755 if mount.mode is None else mount.mode
        look = Look(mode, mount.uid or 0, mount.gid or 0)
        alone = mount.sharing == "private"
        return stack.enter_context(self._store.cache_mounts.used(name, look, alone=alone))

    def _copied(self, run: ins.Run, mount: Mount, stage: Stage, stack: ExitStack) -> Path:
        """Copy what a bind mount shows: what a step writes to it is thrown away."""
        scratch = stack.enter_context(self._files.scratch())
        folder = stack.enter_context(self._files.scratch())
        tree = self._files.tree(mount.stage, stage, run)
        prepare(_copy_of(run, mount), tree, View(()), scratch).write(Destination(folder, ()))
        found = [entry.path for entry in os.scandir(folder)]
        return Path(found[0]) if _is_file(tree.find(mount.source or "/")) else folder


def _is_file(node: object) -> bool:
    return bool(getattr(node, "is_file", False))


def _copy_of(run: ins.Run, mount: Mount) -> ins.Copy:
    return ins.Copy(run.place, (mount.source or "/",), "/", stage=mount.stage)


def as_written(mounts: tuple[Mount, ...]) -> str:
    """Give the mounts as they count for the key.

    What a cache or a secret holds is no part of it, and of files their content is.
    """
    return " ".join(_written(one) for one in mounts)


def _written(mount: Mount) -> str:
    if mount.type == "bind":
        mount = replace(mount, stage="", source="")
    fields = {one.name: getattr(mount, one.name) for one in dataclass_fields(mount)}
    return ",".join(f"{name}={value!r}" for name, value in fields.items() if value)
