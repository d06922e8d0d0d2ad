"""Which tests run here: a guard tries the act, it never asks who the user is.

A test marked `needs("overlay", ...)` is skipped with a reason where this host lacks one of them.
With `--require=all` (or SANDBOX_KERNEL_REQUIRE=all) that is a failure, so that nothing is skipped
in silence on a build machine; `--require=overlay,cgroup` names single ones. The same holds for
`programs("skopeo", ...)`, which other people's tools a test speaks to.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Mapping

import pytest

NOT_INSTALLED = "it is not installed; .ci/packages has it"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        default=os.environ.get("SANDBOX_KERNEL_REQUIRE", ""),
        metavar="CAPS",
        help="capabilities that must be there, separated by commas, or all",
    )


@functools.cache
def capabilities() -> Mapping[str, str]:
    """Give each capability of this host with the reason why it is missing, or an empty text."""
    from sandbox_kernel.linux import probe

    found: Mapping[str, str] = probe.capabilities()
    return found


def missing(names: tuple[str, ...]) -> dict[str, str]:
    """Give the reason for each of these capabilities that this host lacks."""
    known = capabilities()
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise pytest.UsageError(
            f"needs() names {', '.join(unknown)}; the probe knows {', '.join(sorted(known))}"
        )
    return {name: known[name] for name in names if known[name]}


def pytest_runtest_setup(item: pytest.Item) -> None:
    names = tuple(name for mark in item.iter_markers("needs") for name in mark.args)
    lacking = missing(names) if names else {}
    for mark in item.iter_markers("programs"):
        lacking |= {name: NOT_INSTALLED for name in mark.args if shutil.which(name) is None}
    if not lacking:
        return
    text = "; ".join(f"{name}: {reason}" for name, reason in lacking.items())
    required = set(item.config.getoption("--require").split(","))
    if "all" in required or required & set(lacking):
        pytest.fail(f"required, but missing here: {text}", pytrace=False)
    pytest.skip(text)
