"""What the documentation says and the code knows must be the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sandbox_kernel import config
from sandbox_kernel.kernel.report import error_of
from sandbox_kernel.model import CellResult, Limits, Outcome, Usage

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
MIB = 1 << 20

BEGIN = "<!-- limits: the table of config.limits_markdown() -->\n"
END = "<!-- end of limits -->\n"


def ended(outcome: Outcome) -> CellResult:
    """Give the end of a cell that had lowered its memory to 256 MiB."""
    limits = Limits(
        memory_bytes=256 * MIB,
        cpus=1.0,
        cpu_time_s=1.0,
        wall_time_s=1.0,
        processes=1,
        disk_bytes=MIB,
        output_bytes=MIB,
        open_files=64,
    )
    usage = Usage(peak_memory_bytes=256 * MIB)
    return CellResult(outcome, False, usage, limits, container_id="")


def name_and_text(outcome: Outcome) -> tuple[str, str]:
    ceiling = config.limits_of(config.SandboxConfig())
    error = error_of(ended(outcome), ceiling=ceiling, grace_s=2.0)
    assert error is not None
    return error.ename, error.evalue


def test_the_readme_has_the_table_of_limits() -> None:
    _, begin, rest = README.read_text("utf-8").partition(BEGIN)
    table, end, _ = rest.partition(END)
    assert "" not in (begin, end), "README.md has lost the comments around the table of limits"
    assert table == config.limits_markdown(), "put limits_markdown() between the two comments"


def test_the_readme_shows_the_error_that_the_kernel_prints() -> None:
    ename, evalue = name_and_text(Outcome.MEMORY)
    assert f"\n{ename}: {evalue}\n" in README.read_text("utf-8")


@pytest.mark.parametrize("outcome", [o for o in Outcome if not o.commits])
def test_the_readme_names_each_end_of_a_cell(outcome: Outcome) -> None:
    ename, _ = name_and_text(outcome)
    row = rf"^\| `{outcome.value}` \| `{ename}`.* \| rolled back \|$"
    assert re.search(row, README.read_text("utf-8"), re.MULTILINE)


def test_the_readme_names_each_workspace_mode() -> None:
    for mode in config.WORKSPACE_MODES:
        assert f"| `{mode}` |" in README.read_text("utf-8")


def test_each_limit_is_explained() -> None:
    text = (ROOT / "docs" / "limits.md").read_text("utf-8")
    for limit in config.LIMITS:
        assert f"## `{limit.name}`" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_exist(page: Path) -> None:
    """A module is named as `package/module.py` or, after its package, as `package.module`."""
    package = ROOT / "sandbox_kernel"
    layers = "|".join(sorted(p.name for p in package.iterdir() if (p / "__init__.py").exists()))
    text = page.read_text("utf-8")
    for name in re.findall(rf"`((?:{layers})/\w+\.py)`", text):
        assert (package / name).exists(), name
    for layer, module in re.findall(rf"`({layers})\.([a-z]\w*)[`.]", text):
        assert (package / layer / f"{module}.py").exists(), f"{layer}.{module}"
