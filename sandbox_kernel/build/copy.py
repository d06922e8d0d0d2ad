"""COPY and ADD: find the sources, hash them for the cache, and write them as a new layer."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.archive import is_archive, unpacked
from sandbox_kernel.build.config import join
from sandbox_kernel.build.content import Content, content_of
from sandbox_kernel.build.context import ContextTree
from sandbox_kernel.build.dockerfile import is_git, is_url
from sandbox_kernel.build.ignore import Ignore
from sandbox_kernel.build.layer_folder import LayerFolder, Looks
from sandbox_kernel.build.permissions import Chmod, parse_chmod, parse_chown
from sandbox_kernel.build.select import Item, Source, select
from sandbox_kernel.build.tree import LayerTree, Tree
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.view import View

if TYPE_CHECKING:
    from sandbox_kernel.build.download import Remote

_FOLDER_MODE = 0o755
_NS = 1_000_000_000


@dataclass(frozen=True)
class Destination:
    """Where a transfer goes: an empty folder, on top of `lowers`, the lowest first.

    `epoch_s` is the time of what has none of its own: files of the build context, new folders.
    """

    folder: Path
    lowers: tuple[Path, ...]
    working_dir: str = "/"
    epoch_s: int = 0


@dataclass(frozen=True)
class Transfer:
    """A COPY or ADD whose sources are found. `scratch` is a folder of its own until it is done."""

    instruction: ins.Copy | ins.Add
    sources: tuple[Source, ...]
    remotes: tuple[Remote, ...]
    scratch: Path
    chmod: Chmod | None = None
    owner: tuple[int, int] | None = None

    def content(self) -> Content:
        """Hash what is copied; raises BuildError. URLs without checksum are fetched for it."""
        with self.instruction.place.blamed():
            promised = [one for one in self.remotes if one.checksum]
            fetched = [one for one in self.remotes if not one.checksum]
            sources = [*self.sources, *(self._fetched(one) for one in fetched)]
            unpacks = self.instruction.unpack if isinstance(self.instruction, ins.Add) else False
            found = content_of(sources, self._ownership, unpacks=unpacks)
            if not promised:
                return found
            files = found.files | {one.url: one.checksum for one in promised}
            names = " ".join(f"{one.name} {one.checksum}" for one in promised)
            return Content(f"{found.digest} {names}", files)

    def write(self, to: Destination) -> None:
        """Write the layer; raises BuildError. `to.folder` may hold anything then."""
        with self.instruction.place.blamed():
            # With --link the layer shall be the same on whatever lies below.
            lowers: Sequence[Path] = () if self.instruction.link else to.lowers
            layer = LayerFolder(to.folder, lowers)
            try:
                self._write(layer, to)
            except BaseException:  # also an interrupt: the half-written layer goes
                layer.close()
                raise
            layer.finish()

    def _write(self, layer: LayerFolder, to: Destination) -> None:
        text = self.instruction.destination
        is_folder = text.endswith("/") or text.rpartition("/")[2] in ("", ".", "..")
        path = layer.resolve(join(to.working_dir, text))
        uid, gid = self.owner or (0, 0)
        made = Looks(_FOLDER_MODE, uid, gid, to.epoch_s * _NS)
        sources = [*self.sources, *map(self._fetched, self.remotes)]
        if is_folder:
            layer.make_folder(path, made)
        elif sum(not one.is_folder for one in sources) > 1 and not layer.is_folder(path):
            raise BuildError(
                f"several files cannot be copied to the one file {text}",
                hint="end the destination with a slash: it is a folder then",
            )
        for number, source in enumerate(sources):
            layer.forget_links()
            self._write_source(layer, self._opened(source, number), path, made)

    def _write_source(self, layer: LayerFolder, source: Source, path: str, made: Looks) -> None:
        if source.is_folder:
            layer.make_folder(path, made)
        elif layer.is_folder(path):
            path = f"{path}/{source.name}".lstrip("/")
        else:
            layer.make_folder(path.rpartition("/")[0], made)
        if not path and not source.is_folder:
            raise BuildError("a file cannot be copied to /", hint="write / as /NAME")
        for item in source.items():
            target = f"{path}/{item.target}".strip("/")
            mode, uid, gid = self._ownership(item)
            looks = Looks(mode, uid, gid, item.node.mtime_ns or made.mtime_ns)
            if item.node.is_folder:
                layer.add_folder(target, looks)
            else:
                layer.add(target, source.tree, item.node, looks)

    def _ownership(self, item: Item) -> tuple[int, int, int]:
        node = item.node
        mode = node.mode & 0o7777
        if self.chmod is not None and not node.is_link:
            mode = self.chmod(mode, node.is_folder)
        return (mode, *(self.owner or (node.uid, node.gid)))

    def _opened(self, source: Source, number: int) -> Source:
        """Give the content of an archive where ADD unpacks it, else the source as it is."""
        instruction = self.instruction
        if not isinstance(instruction, ins.Add) or source.is_folder:
            return source
        is_local = source.tree.title == ContextTree.title
        wanted = is_local if instruction.unpack is None else instruction.unpack
        if not wanted or not is_archive(source.tree, source.node):
            return source
        folder = self.scratch / f"archive-{number}"
        folder.mkdir()
        return unpacked(source, folder)

    def _fetched(self, one: Remote) -> Source:
        folder = self.scratch / f"remote-{self.remotes.index(one)}"
        if not folder.is_dir():
            folder.mkdir()
            from sandbox_kernel.build.download import download  # noqa: PLC0415 - see `_remotes`

            try:
                download(one, folder)
            except BaseException:  # also an interrupt: the empty folder goes
                folder.rmdir()
                raise
        return _single(folder, one.name, "what was fetched")


def prepare(instruction: ins.Copy | ins.Add, tree: Tree, view: View, scratch: Path) -> Transfer:
    """Find what an instruction copies; raises BuildError, which names its line.

    The instruction is resolved. `tree` is the build context, or what --from names; `view` shows
    the stage's layers, whose tables name owners; `scratch` is an empty folder, on the same file
    system as the layers at best, and the caller's to remove.
    """
    with instruction.place.blamed():
        parents = isinstance(instruction, ins.Copy) and instruction.parents
        urls = tuple(one for one in instruction.sources if is_url(one))
        if isinstance(instruction, ins.Copy) and urls:
            raise BuildError(f"COPY of the URL {urls[0]}", hint="use ADD, which fetches URLs")
        _refuse_git(instruction)
        paths = tuple(one for one in instruction.sources if not is_url(one))
        sources = select(tree, paths, excludes=instruction.excludes, parents=parents)
        checksum = instruction.checksum if isinstance(instruction, ins.Add) else ""
        if checksum and (len(urls), len(paths)) != (1, 0):
            raise BuildError("ADD --checksum is for one URL", hint="use one ADD for each URL")
        return Transfer(
            instruction,
            sources + _documents(instruction, scratch),
            _remotes(urls, checksum),
            scratch,
            parse_chmod(instruction.chmod) if instruction.chmod else None,
            parse_chown(instruction.chown, view) if instruction.chown else None,
        )


def _remotes(urls: tuple[str, ...], checksum: str) -> tuple[Remote, ...]:
    if not urls:
        return ()
    # httpx is slow to load, and a build that the cache answers takes no longer than that.
    from sandbox_kernel.build.download import remote  # noqa: PLC0415

    return tuple(remote(url, checksum) for url in urls)


def _refuse_git(instruction: ins.Copy | ins.Add) -> None:
    for one in instruction.sources:
        if is_git(one):
            raise BuildError(
                f"the Git repository {one} is no source",
                hint="RUN git clone, or clone it into the build context and COPY it",
            )


def _documents(instruction: ins.Copy | ins.Add, scratch: Path) -> tuple[Source, ...]:
    found = []
    for number, document in enumerate(instruction.documents):
        if "/" in document.name or document.name in (".", ".."):
            raise BuildError(f"a heredoc named {document.name}", hint="give it a plain name")
        folder = scratch / f"document-{number}"
        folder.mkdir()
        (folder / document.name).write_text(document.text, "utf-8", newline="")
        (folder / document.name).chmod(0o644)
        found.append(_single(folder, document.name, "the heredocs"))
    return tuple(found)


def _single(folder: Path, name: str, title: str) -> Source:
    # It has no time of its own.
    os.utime(folder / name, (0, 0))
    tree = LayerTree(View([folder]), title)
    node = tree.find(name)
    if node is None:
        raise BuildError(f"{name} is gone from {title}", hint="build again")
    return Source(tree, name, node, Ignore())
