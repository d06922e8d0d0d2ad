"""The interpreter of an image of the store, with its agent: all that a session on it needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sandbox_kernel.build.agent import RECIPE, check_fit, prepare_agent
from sandbox_kernel.build.agent_bytecode import Compiler
from sandbox_kernel.build.agent_download import Progress
from sandbox_kernel.build.agent_files import MAX_BYTES
from sandbox_kernel.build.python_facts import PythonFacts, ask_python, parse_facts
from sandbox_kernel.build.run import Job, JobLimits, run
from sandbox_kernel.container.job import Program
from sandbox_kernel.errors import ImageError, LaunchError
from sandbox_kernel.image.documents import ImageConfig, chain_id, digest_of, render_json
from sandbox_kernel.image.layered import PATH, Interpreter, cell_account, find_python
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.image.view import View
from sandbox_kernel.model import Bind, Layers

LIMITS = JobLimits(memory_bytes=1 << 30, processes=64, wall_time_s=120.0, disk_bytes=64 << 20)
"""Of a question to an image's Python, and of compiling an agent."""
_STDERR_BYTES = 4096


@dataclass(frozen=True)
class _Python:
    """An interpreter in a container of some layers."""

    path: str
    layers: Layers
    env: tuple[tuple[str, str], ...]
    limits: JobLimits

    def run(self, argv: Sequence[str], binds: tuple[Bind, ...] = ()) -> bytes:
        """Run it with these arguments; give its stdout.

        Raises ImageError if it fails, LaunchError and HostError if no container can be made.
        """
        streams = {"stdout": bytearray(), "stderr": bytearray()}

        def take(name: str, data: bytes) -> None:
            if len(streams[name]) <= MAX_BYTES:
                streams[name] += data

        # As root, since it is the one user that every container has.
        program = Program((self.path, *argv), self.env, "/")
        try:
            ran = run(Job(program, self.layers, binds=binds, limits=self.limits), take)
        except LaunchError as error:
            if not error.step.startswith("exec"):  # it is the host that lacks something
                raise
            raise ImageError(f"{self.path} does not start: {error.message}") from error
        if ran.succeeded:
            return bytes(streams["stdout"])
        tail = bytes(streams["stderr"][-_STDERR_BYTES:]).decode("utf-8", "replace").strip()
        if ran.limit:
            why = f"it reached the limit of {ran.limit}"
        elif ran.signal is not None:
            why = f"signal {ran.signal} ended it"
        else:
            why = tail.rpartition("\n")[2] or f"it exits with {ran.code}"
        raise ImageError(f"{self.path}: {why}")


@dataclass(frozen=True)
class Unpacked:
    """An image of the store by the name that it was asked for, and its layers."""

    reference: str
    stored: StoredImage
    layers: Layers


def image_interpreter(
    store: Store, image: Unpacked, progress: Progress, waived: frozenset[str] = frozenset()
) -> Interpreter:
    """Give the Python of an image and its agent, made if need be.

    The agent stays while the store is open. `waived` are limits that this host need not enforce.
    Raises ImageError, HostError for a limit that it cannot, LaunchError without a container.
    """
    limits = _limits(waived)
    layers, config, reference = image.layers, image.stored.config, image.reference
    view = View([f"{layers.folder}/{name}" for name in layers.names])
    path = find_python(reference, config, view)
    home = cell_account(view, config.user).home
    env = tuple({"PATH": PATH, "HOME": home, **dict(config.env)}.items())
    python = _Python(path, layers, env, limits)
    facts = _facts(store, image.stored.image_id, reference, python)
    compiler = _compiler(config, layers, view, python)
    agent = prepare_agent(store, facts, progress, compiler)
    check_fit(reference, facts, agent)
    # Before 2.34 sem_open(3) looked for a tmpfs, and a folder of an overlay is none.
    needs_tmpfs = facts.libc == "glibc" and facts.libc_version < (2, 34)
    return Interpreter(path, str(agent), needs_tmpfs)


def _facts(store: Store, image_id: str, reference: str, python: _Python) -> PythonFacts:
    """Ask an image's Python once, and remember what it said."""
    key = digest_of(render_json({"recipe": RECIPE, "facts of": image_id}))
    record = store.records.get(key)
    if record is not None and isinstance(answer := record.value.get("answer"), str):
        return parse_facts(reference, answer.encode())
    answers: list[bytes] = []

    def ask(argv: Sequence[str]) -> bytes:
        answers.append(python.run(argv))
        return answers[-1]

    facts = ask_python(reference, ask)
    last = answers[0].decode().strip().rpartition("\n")[2]
    store.records.put(key, {"digests": [], "answer": last})
    return facts


def _compiler(config: ImageConfig, layers: Layers, view: View, python: _Python) -> Compiler:
    """Give the image's Python as its lowest layers have it: what others build on, they share."""
    entry = view.find(python.path)
    assert entry is not None  # noqa: S101 - find_python has found it
    count = 1
    while count < len(layers.names):
        below = View([f"{layers.folder}/{name}" for name in layers.names[:count]])
        found = below.find(entry.path)
        if found is not None and found.source == entry.source:
            break
        count += 1
    base = Layers(layers.folder, layers.names[:count])
    env = (("PATH", PATH), ("PYTHONHASHSEED", "0"))
    lowest = replace(python, path=entry.path, layers=base, env=env)
    return Compiler(chain_id(config.diff_ids[:count]), lowest.run)


def _limits(waived: frozenset[str]) -> JobLimits:
    return replace(
        LIMITS,
        memory_bytes=None if "memory" in waived else LIMITS.memory_bytes,
        processes=None if "processes" in waived else LIMITS.processes,
    )
