"""The agent: what the guest needs in an image beyond the image's own packages, as a layer.

It is made once for a version of Python, a machine and a C library, and kept in the store: from
what is installed here where that fits, which needs no network, otherwise downloaded. It holds
bytecode, if ours is of the right version. If not, the image's Python makes it. What that writes is
taken for sessions on the same layers only, since an image could write anything: the lowest layers
of the image that have its Python stand for it, so images on a common base share it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from sandbox_kernel.build.agent_bytecode import Compiler, compile_here, compile_there
from sandbox_kernel.build.agent_download import Progress, downloaded_files
from sandbox_kernel.build.agent_files import packages_in, write_files
from sandbox_kernel.build.agent_local import installed_files
from sandbox_kernel.build.agent_packages import LEFT_OUT, NEEDED, ROOTS, closure, markers
from sandbox_kernel.build.layer import Layer, layer_of_folder
from sandbox_kernel.build.python_facts import PythonFacts, own_facts
from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.documents import Descriptor, digest_of, render_json
from sandbox_kernel.image.fields import Fields
from sandbox_kernel.image.store import Store
from sandbox_kernel.linux.tree_tar import Packing

RECIPE = 1
"""Raised when the same packages give another agent."""
_PACKING = Packing(epoch_s=0, owner=(0, 0))

Make = Callable[[Path], None]
"""Writes an agent into an empty folder."""


def prepare_agent(
    store: Store, facts: PythonFacts, progress: Progress, compiler: Compiler | None = None
) -> Path:
    """Give the folder of the agent for an image's Python; raises ImageError.

    It stays while the store is open. Without a `compiler`, sessions on a Python of another version
    than ours start later.
    """
    is_ours = facts.version == own_facts().version

    def make(folder: Path) -> None:
        progress(f"Making what cells need on Python {facts.python} ({facts.libc_name})")
        files = installed_files(facts)
        write_files(folder, downloaded_files(facts, progress) if files is None else files)
        if is_ours:
            write_files(folder, compile_here(folder, facts.version))

    plain = _layer(store, {"facts": _key_of(facts)}, make, progress)
    tree = _tree(store, plain)
    if is_ours or compiler is None:
        return tree
    return _tree(store, _compiled(store, plain, facts, compiler, progress))


def check_fit(reference: str, facts: PythonFacts, agent: Path) -> None:
    """Raise ImageError if packages of an image, which come first, and the agent's do not fit."""
    own = {package.name: package for package in facts.packages}
    there = {**packages_in(agent), **own}
    _, unmet = closure(NEEDED, there, markers(facts.version, facts.machine))
    # An image's package may need others of the image, which nobody has asked for.
    wrong = next((one for one in unmet if one.version), None)
    if wrong is None:
        return
    wanted = f"{wrong.name}{wrong.requirement.specifier}"
    found = f"{wrong.name} {wrong.version}"
    if wrong.name in own:
        hint = f"run pip install '{wanted}' in the image, or remove {wrong.name} from it"
    else:
        hint = f"run pip install '{wanted}' in the image"
    raise ImageError(
        f"image {reference!r} cannot run cells: {wrong.by} needs {wanted}, and there is {found}",
        hint=hint,
    )


def _key_of(facts: PythonFacts) -> list[object]:
    return [facts.python, facts.machine, facts.libc_name, list(ROOTS), sorted(LEFT_OUT)]


def _compiled(
    store: Store, plain: Layer, facts: PythonFacts, compiler: Compiler, progress: Progress
) -> Layer:
    def make(folder: Path) -> None:
        progress(f"Compiling what cells need on Python {facts.python}")
        tree = _tree(store, plain)
        shutil.copytree(tree, folder, dirs_exist_ok=True)
        try:
            write_files(folder, compile_there(compiler, tree, facts.version))
        except ImageError as error:  # it works without, and would fail again
            progress(f"Sessions will start later: {error.message}")

    return _layer(store, {"agent": plain.diff_id, "base": compiler.base}, make, progress)


def _layer(store: Store, what: dict[str, object], make: Make, progress: Progress) -> Layer:
    """Give a layer of the store by what it was made from; whoever comes first makes it."""
    key = digest_of(render_json({"recipe": RECIPE, **what}))
    found = _known(store, key)
    if found is not None:
        return found

    def wait() -> None:
        progress("Another process makes what cells need; waiting for it")

    with store.locked(f"agent-{key[-16:]}", wait):
        found = _known(store, key)
        if found is not None:
            return found
        with store.scratch() as folder:
            folder.mkdir(0o755)
            folder.chmod(0o755)
            make(folder)
            layer = layer_of_folder(store, folder, _PACKING)
        if layer is None:
            raise ImageError("an agent without files")
        store.records.put(key, {**layer.as_json(), "digests": [layer.blob.digest, layer.diff_id]})
    return layer


def _known(store: Store, key: str) -> Layer | None:
    record = store.records.get(key)
    if record is None:
        return None
    fields = Fields(record.value, f"the record {key}")
    layer = Layer(Descriptor.from_json(fields.object("blob").values), fields.text("diff_id"))
    return layer if store.has_blob(layer.blob.digest) else None


def _tree(store: Store, layer: Layer) -> Path:
    return store.ensure_layer(layer.blob, layer.diff_id)
