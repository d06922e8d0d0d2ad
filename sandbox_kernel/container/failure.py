"""Word why a session could not be set up: the message `failed` of the control channel."""

from __future__ import annotations

import errno

from sandbox_kernel.errors import HostError, LaunchError

SHOW_PROC = (
    "Linux mounts a new proc only where all of the old one is seen; inside of another container "
    "have it show the whole /proc; Docker: --security-opt systempaths=unconfined, "
    "Podman: --security-opt unmask=ALL, Kubernetes: procMount: Unmasked"
)
REMEDIES = {
    errno.EAGAIN: "the host lets no more processes start: end some, or raise pids.max of the "
    "cgroup that Jupyter runs in (TasksMax= of its unit), or its ulimit -u",
    errno.EMFILE: "raise the limit of open files of whoever starts Jupyter: ulimit -n",
    errno.ENFILE: "the host has too many open files: raise the sysctl fs.file-max",
    errno.ENOMEM: "the host has no memory left, or the cgroup that Jupyter runs in: see its "
    "memory.max",
}
"""What to do about errors that mean the same whatever was tried."""


def hint_for(error: OSError) -> str:
    """Say what to do about an error of the system; empty where nothing is known to help."""
    number = error.errno or 0
    if number not in REMEDIES and (error.strerror or "").startswith("clone: "):
        # Loaded now, since a start that succeeds does without it.
        from sandbox_kernel.linux.probe_remedy import remedy  # noqa: PLC0415

        return remedy("user_namespace", number)
    return REMEDIES.get(number, "")


def failed(error: OSError | HostError | LaunchError, step: str) -> dict[str, str]:
    """Give the message; `step` is what was tried, for an error that does not say it."""
    message = {"op": "failed", "step": step, "hint": ""}
    if isinstance(error, LaunchError):
        return message | {"step": error.step, "cause": error.cause, "hint": error.hint}
    if isinstance(error, HostError):
        return message | {"cause": error.message, "hint": error.hint}
    where = f" ({error.filename})" if error.filename else ""
    hint = hint_for(error)
    return message | {"cause": f"{error.strerror or error}{where}", "hint": hint}
