"""A process of this package's own for one piece of work: its order in argv, its answer on stdout.

Exec'ed and not forked, since the callers have threads. It loads nothing but the standard library
and this package.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_PROGRAM = "import sys; sys.path.insert(0, {root!r}); from {module} import main; main()"


@contextlib.contextmanager
def started(
    module: str, order: dict[str, Any], fds: Sequence[int]
) -> Iterator[subprocess.Popen[bytes]]:
    """Start `main` of a module, with pipes and these descriptors; it has ended in the end."""
    root = str(Path(__file__).resolve().parents[2])
    program = _PROGRAM.format(root=root, module=module)
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", program, json.dumps(order)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=tuple(fds),
        env={"LANG": "C.UTF-8"},
    )
    with child:
        try:
            yield child
        except BaseException:
            # Also an interrupt: who waits for the child must not wait for all of its work.
            child.kill()
            raise
