"""Bytecode of an agent: without it every start of a session compiles 800 modules, for 0.5 s.

A cell cannot write it, since the agent is read-only there. Bytecode is the interpreter's own, so
where the image's Python is not of our version it is made by the image's, which is not trusted:
see `agent`. It is unchecked (PEP 552), because files of a layer never change.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandbox_kernel.build.agent_files import MAX_BYTES, Files
from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.layered import AGENT
from sandbox_kernel.model import Bind

SCRIPT = """\
import sys
sys.path.pop(0)
import importlib.util, marshal, os, struct
root, shown = sys.argv[1:]
for folder, below, names in os.walk(root):
    below.sort()
    for name in sorted(names):
        if not name.endswith(".py"):
            continue
        path = os.path.join(folder, name)[len(root) + 1:]
        with open(os.path.join(root, path), "rb") as file:
            source = file.read()
        try:
            code = compile(source, shown + "/" + path, "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            continue
        head = importlib.util.MAGIC_NUMBER + struct.pack("<I", 1)
        data = head + importlib.util.source_hash(source) + marshal.dumps(code)
        encoded = path.encode()
        sys.stdout.buffer.write(struct.pack("!II", len(encoded), len(data)) + encoded + data)
"""
"""Compiles all below its first argument, as if it lay below the second."""

_LENGTHS = struct.Struct("!II")


@dataclass(frozen=True)
class Compiler:
    """An interpreter of an image that compiles an agent for that image.

    `base` is the ChainID of the layers that it runs on, and that are trusted for images on top of
    them only. `run` runs it with arguments and binds, gives its stdout, and raises ImageError.
    """

    base: str
    run: Callable[[Sequence[str], tuple[Bind, ...]], bytes]


def compile_here(folder: Path, version: tuple[int, int]) -> Files:
    """Compile an agent's folder by the Python that runs this, which must be of that version."""
    # Without a fixed seed, sets of constants come in another order each time.
    done = subprocess.run(
        [sys.executable, "-S", "-s", "-c", SCRIPT, os.fspath(folder), AGENT],
        env={"PYTHONHASHSEED": "0"},
        cwd="/",
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise ImageError(f"{sys.executable} cannot compile the agent: {last}")
    return read_bytecode(done.stdout, folder, version)


def compile_there(compiler: Compiler, folder: Path, version: tuple[int, int]) -> Files:
    """Compile an agent's folder by an image's Python; raises ImageError."""
    output = compiler.run(["-S", "-s", "-c", SCRIPT, AGENT, AGENT], (Bind(str(folder), AGENT),))
    return read_bytecode(output, folder, version)


def read_bytecode(output: bytes, folder: Path, version: tuple[int, int]) -> Files:
    """Give the files that SCRIPT wrote; raises ImageError for any but bytecode of `folder`."""
    if len(output) > MAX_BYTES:
        raise ImageError(f"the bytecode of the agent has {len(output)} bytes")
    tag = "cpython-{}{}".format(*version)
    sources = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    found: Files = {}
    at = 0
    while at < len(output):
        try:
            name_bytes, data_bytes = _LENGTHS.unpack_from(output, at)
            at += _LENGTHS.size
            name = output[at : at + name_bytes].decode()
        except (struct.error, UnicodeDecodeError):
            raise ImageError("the bytecode of the agent is cut off") from None
        at += name_bytes + data_bytes
        if name not in sources or at > len(output):
            raise ImageError(
                f"the bytecode of the agent holds {name[:200]!r}, which is not its own"
            )
        above, _, module = name.rpartition("/")
        place = f"{above}/__pycache__" if above else "__pycache__"
        found[f"{place}/{module[:-3]}.{tag}.pyc"] = output[at - data_bytes : at]
    return found
