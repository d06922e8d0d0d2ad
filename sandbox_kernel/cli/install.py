"""`sandbox-kernel install`: check the settings, then register a kernelspec that has them."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

import sandbox_kernel
from sandbox_kernel.cli.options import config_from, setting_options
from sandbox_kernel.config import LIMITS, SandboxConfig, Settings, arguments_of, freeze
from sandbox_kernel.errors import ConfigError, SandboxError

DEFAULT_NAME = "sandbox-python"


@click.command()
@click.option("--user", is_flag=True, help="Install for the current user.")
@click.option("--sys-prefix", is_flag=True, help="Install into this Python's environment.")
@click.option("--prefix", metavar="P", help="Install into P/share/jupyter/kernels.")
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="The kernelspec's name.")
@click.option("--display-name", help="What menus show.")
@setting_options
def install(
    *,
    user: bool,
    sys_prefix: bool,
    prefix: str | None,
    name: str,
    display_name: str | None,
    **settings: Any,
) -> None:
    """Register the kernel with Jupyter, for all users unless an option says otherwise.

    Every cell has these limits, and may raise them to the ceiling. `jupyter kernelspec list` and
    `jupyter kernelspec remove` do the rest.
    """
    if user + sys_prefix + (prefix is not None) > 1:
        raise ConfigError("--user, --sys-prefix and --prefix exclude each other", hint="give one")
    check_name(name)
    config = config_from(settings)
    frozen = freeze(config)
    check_image(frozen.image, frozen.waived)
    spec = kernelspec(config, frozen, display_name=display_name)
    folder = write(spec, name, user=user, prefix=sys.prefix if sys_prefix else prefix)
    click.echo(f"Installed kernelspec {name.lower()} in {folder}")


def check_name(name: str) -> None:
    """Raise ConfigError if Jupyter would not take this name for a kernelspec."""
    if re.fullmatch(r"[A-Za-z0-9._-]*[A-Za-z0-9][A-Za-z0-9._-]*", name, re.ASCII) is None:
        raise ConfigError(
            f"{name!r} is no name for a kernelspec",
            hint=f"use letters, digits and - . _ only, for example {DEFAULT_NAME}",
        )


def check_image(reference: str, waived: frozenset[str]) -> None:
    """Make an image ready for its first session: unpack it, and prepare its agent.

    Raises ImageError if there is no such image or cells cannot run in it, ConfigError for an ID.
    """
    from sandbox_kernel.image.host import REFERENCE  # noqa: PLC0415 - not for --help

    if reference != REFERENCE:
        from sandbox_kernel.cli.image_ready import make_ready  # noqa: PLC0415 - slow to import

        make_ready(reference, waived)


def template_dir() -> Path:
    """Give the folder with kernel.json and the logos, in an installation or a checkout."""
    package = Path(sandbox_kernel.__file__).parent
    for folder in (package / "kernelspec", package.parent / "kernelspec"):
        if (folder / "kernel.json").is_file():
            return folder
    raise SandboxError(
        f"the kernelspec's template is missing beside {package}",
        hint="install the package again: pip install --force-reinstall sandbox-kernel",
    )


def kernelspec(
    config: SandboxConfig, frozen: Settings, *, display_name: str | None
) -> dict[str, Any]:
    """Give the content of kernel.json for a checked configuration."""
    spec: dict[str, Any] = json.loads((template_dir() / "kernel.json").read_text("utf-8"))
    # The interpreter by its path: `python` would be that of whoever starts the kernel.
    spec["argv"] = [sys.executable, *spec["argv"][1:], *arguments_of(config)]
    if display_name is not None:
        spec["display_name"] = display_name
    shown = {limit.name: limit.format(getattr(frozen.limits, limit.field)) for limit in LIMITS}
    spec["metadata"]["sandbox_kernel"] = {
        "image": frozen.image,
        "workspace": frozen.workspace_mode,
        "limits": shown,
    }
    return spec


def write(spec: dict[str, Any], name: str, *, user: bool, prefix: str | None) -> Path:
    """Install a kernelspec, in place of one of this name; gives its folder.

    Raises SandboxError where the folder cannot be written; then no new folder is left.
    """
    from jupyter_client.kernelspec import KernelSpecManager  # noqa: PLC0415 - slow to import

    folder = kernels_dir(user=user, prefix=prefix) / name.lower()
    before = folder.exists()
    with tempfile.TemporaryDirectory(prefix="sandbox-kernelspec-") as temporary:
        source = Path(temporary) / name
        source.mkdir()
        for logo in template_dir().glob("logo-*"):
            shutil.copyfile(logo, source / logo.name)
        text = json.dumps(spec, indent=2, ensure_ascii=False) + "\n"
        (source / "kernel.json").write_text(text, "utf-8")
        try:
            KernelSpecManager().install_kernel_spec(
                str(source), kernel_name=name, user=user, prefix=prefix
            )
        except OSError as error:
            if not before:
                shutil.rmtree(folder, ignore_errors=True)
            raise unwritable(folder, error, shared=not (user or prefix)) from error
    return folder


def kernels_dir(*, user: bool, prefix: str | None) -> Path:
    """Give the folder that Jupyter keeps such kernelspecs in."""
    from jupyter_core.paths import (  # noqa: PLC0415 - slow to import
        SYSTEM_JUPYTER_PATH,
        jupyter_data_dir,
    )

    if user:
        return Path(jupyter_data_dir()) / "kernels"
    if prefix:
        return Path(prefix).absolute() / "share" / "jupyter" / "kernels"
    return Path(SYSTEM_JUPYTER_PATH[0]) / "kernels"


def unwritable(folder: Path, error: OSError, *, shared: bool) -> SandboxError:
    """Give the error for a folder that cannot be written; `shared` is one for all users."""
    hint = "name a folder that you may write, with --prefix, or use --user"
    if shared:
        hint = "use --user, or --sys-prefix in a virtual environment, or run it with sudo"
    return SandboxError(f"cannot write {folder}: {error.strerror or error}", hint=hint)
