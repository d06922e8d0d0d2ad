"""Which files the sources of a COPY or ADD are: globs, folders, --exclude and --parents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sandbox_kernel.build.glob import Glob, has_wildcards, unescaped
from sandbox_kernel.build.ignore import Hits, Ignore
from sandbox_kernel.build.tree import Node, Tree
from sandbox_kernel.errors import BuildError

PIVOT = "/./"
"""With --parents, the folders before it are not kept."""


@dataclass(frozen=True)
class Item:
    """A file, folder or link, and where it goes, relative to its source's place."""

    node: Node
    target: str


@dataclass(frozen=True)
class Source:
    """One thing to copy. A folder means what is in it, with targets relative to the destination.

    A file has one item, whose target is empty: it goes to the destination, or into it under `name`.
    """

    tree: Tree
    name: str
    node: Node
    excludes: Ignore
    parents: Ignore | None = None
    """With --parents: what of the folder is taken, with all folders above it."""

    @property
    def is_folder(self) -> bool:
        """Tell whether its content is copied, and not it itself."""
        return self.node.is_folder

    def items(self) -> Iterator[Item]:
        """Give all that is copied, each folder before what is in it; raises BuildError."""
        if not self.node.is_folder:
            yield Item(self.node, "")
        elif self.parents is None:
            yield from self._below(self.node, "", None)
        else:
            yield from self._with_parents(self.node, "", (None, None))

    def _below(self, folder: Node, target: str, above: Hits | None) -> Iterator[Item]:
        for child in self.tree.children(folder):
            path = f"{target}/{child.name}" if target else child.name
            hits = self.excludes.hits(path, above)
            if not self.excludes.decide(hits):
                yield Item(child, path)
            if child.is_folder and not self._is_out(hits, path):
                yield from self._below(child, path, hits)

    def _is_out(self, hits: Hits, path: str) -> bool:
        return self.excludes.decide(hits) and not self.excludes.takes_back_below(path)

    def _with_parents(
        self, folder: Node, target: str, above: tuple[Hits | None, Hits | None]
    ) -> Iterator[Item]:
        wanted = self.parents or Ignore()
        for child in self.tree.children(folder):
            path = f"{target}/{child.name}" if target else child.name
            hits = wanted.hits(path, above[0]), self.excludes.hits(path, above[1])
            taken = wanted.decide(hits[0]) and not self.excludes.decide(hits[1])
            if not child.is_folder:
                if taken:
                    yield Item(child, path)
                continue
            below = self._with_parents(child, path, hits)
            # A folder that matches nothing is there only for what is in it.
            first = None if taken else next(below, None)
            if taken or first is not None:
                yield Item(child, path)
            if first is not None:
                yield first
            yield from below


def select(
    tree: Tree, texts: tuple[str, ...], *, excludes: tuple[str, ...] = (), parents: bool = False
) -> tuple[Source, ...]:
    """Find the sources of one instruction in a tree; raises BuildError for one that is not there.

    A glob may match nothing. `..` at the front of a path is dropped: the tree is all there is.
    """
    left_out = Ignore(excludes)
    if parents:
        return tuple(_parented(tree, text, left_out) for text in texts)
    return tuple(source for text in texts for source in _sources(tree, text, left_out))


def _sources(tree: Tree, text: str, excludes: Ignore) -> Iterator[Source]:
    parts = _cleaned(text)
    wild = next((n for n, part in enumerate(parts) if has_wildcards(part)), None)
    if wild is None:
        path = "/".join(unescaped(part) for part in parts)
        node = tree.find(path)
        if node is None:
            raise _missing(tree, text)
        name = path.rpartition("/")[2]
        if node.is_folder or not excludes.ignores(name or "."):
            yield Source(tree, name, node, excludes)
        return
    base = tree.find("/".join(unescaped(part) for part in parts[:wild]))
    if base is None or not base.is_folder:
        return
    for match in _matches(tree, base, tuple(Glob(part) for part in parts[wild:])):
        # A link at the top is followed, one deeper down is copied as it is.
        node = tree.find(match.path)
        if node is None:
            raise _missing(tree, match.path)
        if not excludes.ignores(match.name):
            yield Source(tree, match.name, node, excludes)


def _matches(tree: Tree, folder: Node, globs: tuple[Glob, ...]) -> Iterator[Node]:
    for child in tree.children(folder):
        if not globs[0].matches(child.name):
            continue
        if len(globs) == 1:
            yield child
        elif child.is_folder:
            yield from _matches(tree, child, globs[1:])


def _parented(tree: Tree, text: str, excludes: Ignore) -> Source:
    before, _, after = text.partition(PIVOT) if PIVOT in text else ("", "", text)
    base = tree.find("/".join(unescaped(part) for part in _cleaned(before)))
    parts = _cleaned(after)
    pattern = "/".join(parts) or "**"
    if base is None or not base.is_folder:
        raise _missing(tree, text)
    if not has_wildcards(pattern):
        path = "/".join(filter(None, (base.path, unescaped(pattern))))
        if tree.find(path, follow=False) is None:
            raise _missing(tree, text)
    return Source(tree, "", base, excludes, Ignore((pattern,)))


def _cleaned(text: str) -> list[str]:
    """Split a path, and drop what climbs: above the root there is the root."""
    parts: list[str] = []
    for part in text.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return parts


def _missing(tree: Tree, path: str) -> BuildError:
    return BuildError(
        f"{path} is not in {tree.title}",
        hint="paths are relative to the build context; is it left out by .dockerignore?"
        if tree.title == "the build context"
        else "paths count from the root of what --from names",
    )
