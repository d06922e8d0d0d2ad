"""The one entry: `sandbox-kernel` and `python -m sandbox_kernel`.

A kernelspec runs it with `-f CONNECTION_FILE`; that path must stay short, because a user waits
for it: it imports nothing but the kernel. Everything else is the command line of `cli.main`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Start the kernel, or run a command; gives the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0].startswith("-f"):
        from sandbox_kernel.kernel.app import launch  # noqa: PLC0415 - see above

        launch(arguments)
        return 0
    from sandbox_kernel.cli.main import run_command  # noqa: PLC0415 - see above

    return run_command(arguments)


if __name__ == "__main__":
    sys.exit(main())
