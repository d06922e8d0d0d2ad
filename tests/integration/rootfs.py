"""Root file systems of Debian with a Python, made by mmdebstrap, kept by the content of the recipe.

One is built under another name and renamed when it is whole. An ordinary user needs a range of ids.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

PYTHONS = {"bullseye": (3, 9), "bookworm": (3, 11), "trixie": (3, 13)}
"""The version of Python in each suite: the oldest that cells run on, ours at least, a newer one."""
_OPTIONS = (
    "--quiet",
    "--variant=essential",
    "--include=python3,libstdc++6",  # the agent brings programs in C++
    "--skip=output/dev",  # device nodes are refused in layers
    *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale", "info")),
    "--aptopt=Acquire::Retries 3",
)


def rootfs(suite: str) -> Path:
    """Give the tar of a suite; builds it in a minute if it is not in the cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(base) / "sandbox-kernel-images"
    cache.mkdir(parents=True, exist_ok=True)
    key = hashlib.sha256("\0".join((suite, *_OPTIONS)).encode()).hexdigest()[:16]
    target = cache / f"{suite}-{key}.tar"
    with (cache / f"{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as folder:
                whole = Path(folder) / "rootfs.tar"
                with whole.open("wb") as out:  # its own ids cannot look into a home folder
                    done = subprocess.run(
                        ["mmdebstrap", *_OPTIONS, suite, "-"],
                        stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.PIPE, check=False,
                    )  # fmt: skip
                assert done.returncode == 0, done.stderr.decode("utf-8", "replace")[-3000:]
                whole.rename(target)
    return target
