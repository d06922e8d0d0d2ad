"""`sandbox-kernel run`: execute a file on the kernel, without a Jupyter server."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import click

from sandbox_kernel.cli.install import check_image, kernelspec
from sandbox_kernel.cli.options import config_from, setting_options
from sandbox_kernel.config import freeze


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "out",
    type=click.Path(path_type=Path),
    metavar="OUT.ipynb",
    help="Write the executed notebook, also when a cell failed.",
)
@click.option("--allow-errors", is_flag=True, help="Go on after a cell that failed.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON at the end instead of outputs as they come."
)
@setting_options
def run(*, file: Path, out: Path | None, allow_errors: bool, as_json: bool, **settings: Any) -> int:
    """Execute FILE, a notebook or a Python file, each cell in a fresh container.

    A Python file is cut into cells at its `# %%` lines. Outputs go to stdout and stderr as they
    come, and a line for each cell to stderr. It stops at the first cell that fails, one tagged
    raises-exception excepted. Ctrl-C interrupts the cell; a second one ends the run.

    The exit status is 0 if no cell failed, 1 if one did, 2 if FILE or an option is wrong.
    """
    config = config_from(settings)
    frozen = freeze(config)
    check_image(frozen.image, frozen.waived)
    # Not at the top: `sandbox-kernel --help` imports all commands, and these take their time.
    from sandbox_kernel.cli import run_file, run_kernel  # noqa: PLC0415
    from sandbox_kernel.cli.run_job import Job  # noqa: PLC0415

    notebook = run_file.read(file)
    if out is not None:
        run_file.check_writable(out)
    spec = kernelspec(config, frozen, display_name=None)
    spec["argv"] = run_kernel.without_current_folder(spec["argv"])
    job = Job(notebook, allow_errors=allow_errors)
    try:
        asyncio.run(job.run(spec, file.absolute().parent, outputs=not as_json))
    except asyncio.CancelledError:
        raise click.Abort from None
    finally:
        # What was executed is worth keeping, also after an error or an interrupt.
        if out is not None and job.begun:
            run_file.write(notebook, out)
    if as_json:
        click.echo(job.as_json(file))
    return 1 if job.failed else 0
