"""The steps that change files without running anything: COPY, ADD, WORKDIR."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.cache import Key
from sandbox_kernel.build.context import ContextTree
from sandbox_kernel.build.copy import Destination, Transfer, prepare
from sandbox_kernel.build.layer import Layer, layer_of_folder
from sandbox_kernel.build.layer_folder import LayerFolder, Looks
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.build.resolve import Resolved
from sandbox_kernel.build.stage import StageBuild
from sandbox_kernel.build.stages import Stage
from sandbox_kernel.build.tree import LayerTree, Tree
from sandbox_kernel.image.accounts import find_account
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.view import View
from sandbox_kernel.linux.tree_tar import Packing

_NS = 1_000_000_000

Built = Callable[[str, Stage, ins.Instruction], StageBuild]
"""Gives the stage or image that `--from=NAME` names."""


@dataclass(frozen=True)
class Work:
    """A step that changes files: what it depends on, and how it is done."""

    key: Key
    make: Callable[[], Layer | None]


class FileSteps:
    """Makes layers of files of the build context, and of other stages and images."""

    def __init__(
        self, store: Store, options: BuildOptions, context: ContextTree, built: Built
    ) -> None:
        self._store = store
        self._options = options
        self._context = context
        self._built = built

    def work(self, stage: Stage, built: StageBuild, found: Resolved, stack: ExitStack) -> Work:
        """Give what a COPY, ADD or WORKDIR does; raises BuildError."""
        instruction = found.instruction
        if not isinstance(instruction, ins.Copy | ins.Add):
            return self._workdir(built)
        name = instruction.stage if isinstance(instruction, ins.Copy) else ""
        # Names of owners are looked up in the image, which has to be unpacked for it.
        view = built.view() if instruction.chown else View(())
        scratch = stack.enter_context(self.scratch())
        transfer = prepare(instruction, self.tree(name, stage, instruction), view, scratch)
        content = transfer.content()
        parts = {
            "destination": instruction.destination,
            "working directory": built.state.config.working_dir,
            "kind": f"{instruction.keyword} --link" if instruction.link else instruction.keyword,
            "owner": ":".join(map(str, transfer.owner or ())),
            "epoch": str(self._options.epoch_s),
            "files": content.digest,
        }
        key = Key(built.key, tuple(parts.items()), content.files)
        return Work(key, lambda: self._transfer(transfer, built))

    def tree(self, name: str, stage: Stage, instruction: ins.Instruction) -> Tree:
        """Give the build context, or what another stage or image shows."""
        if not name:
            return self._context
        return LayerTree(self._built(name, stage, instruction).view(), f"the stage {name}")

    def _transfer(self, transfer: Transfer, built: StageBuild) -> Layer | None:
        with self.scratch() as folder:
            to = Destination(
                folder,
                built.folders(),
                built.state.config.working_dir or "/",
                self._options.epoch_s,
            )
            transfer.write(to)
            return layer_of_folder(self._store, folder, Packing(self._options.epoch_s))

    def _workdir(self, built: StageBuild) -> Work:
        """Give the making of a folder, of the user that the stage has, where it is missing."""
        config = built.state.config
        key = Key(built.key, (("folder", config.working_dir), ("user", config.user)))

        def make() -> Layer | None:
            view = built.view()
            if view.find(config.working_dir) is not None:
                return None
            account = find_account(view, config.user or "0")
            with self.scratch() as folder:
                layer = LayerFolder(folder, built.folders())
                looks = Looks(0o755, account.uid, account.gid, self._options.epoch_s * _NS)
                layer.make_folder(layer.resolve(config.working_dir), looks)
                layer.finish()
                return layer_of_folder(self._store, folder, Packing(self._options.epoch_s))

        return Work(key, make)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty folder on the store's file system, for a time."""
        with self._store.scratch() as path:
            path.mkdir(0o755)
            yield path


def short_digest(text: str) -> str:
    """Give a name for a folder, of any text."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]
