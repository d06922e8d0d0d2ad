"""JupyterLab as a user has it: a server of its own, and a notebook in a page of a browser."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
from nbformat import v4
from playwright.sync_api import Locator, Page, expect

from tests.integration import leaks
from tests.kernel import traces

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Its default, /dev/shm, is small in containers.
    "--disable-dev-shm-usage",
]
TIMEOUT_S = 120.0
KERNEL = "window.jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel"
"""The kernel of the notebook in front, for scripts in the page."""
NAME = "sandbox-python"
DISPLAY_NAME = "Python 3 (sandboxed)"


@dataclass(frozen=True)
class Server:
    """A running JupyterLab: where it is, and the folder that it shows."""

    url: str
    token: str
    folder: Path
    pid: int

    def address(self, path: str) -> str:
        """Give the full address of a page."""
        return f"{self.url}{path}?token={self.token}"

    def kernels(self) -> list[int]:
        """Give the pids of the kernels that run now."""
        return [pid for pid in traces.children()[self.pid] if leaks.runs(pid)]


def environment(base: Path) -> dict[str, str]:
    """Give Jupyter folders of its own below `base`, and nothing of the user's."""
    folders = {
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
        "JUPYTER_PATH": "prefix/share/jupyter",
        "IPYTHONDIR": "ipython",
    }
    places = {name: str(base / folder) for name, folder in folders.items()}
    return {**os.environ, **places, "PYTHONPATH": str(ROOT)}


def _forget_news(base: Path) -> None:
    """Spare the question whether to fetch news, which would lie over the page."""
    file = base / "settings/@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    file.parent.mkdir(parents=True)
    file.write_text('{"fetchNews": "false", "checkForUpdates": false}', encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(base: Path) -> Iterator[Server]:
    """Install the kernel below `base` and run JupyterLab; at the end nothing may be left."""
    env = environment(base)
    _forget_news(base)
    install = ["sandbox_kernel", "install", "--prefix", str(base / "prefix"), "--memory", "512M"]
    subprocess.run([sys.executable, "-m", *install], env=env, check=True, timeout=TIMEOUT_S)
    folder = base / "notebooks"
    folder.mkdir()
    port, token = _free_port(), secrets.token_hex(16)
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.allow_root": True,
        "ServerApp.root_dir": folder,
        "LabApp.expose_app_in_browser": True,
        "IdentityProvider.token": token,
    }
    log = base / "server.log"
    with log.open("wb") as out:
        arguments = [f"--{name}={value}" for name, value in options.items()]
        process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab", *arguments],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    server = Server(f"http://127.0.0.1:{port}", token, folder, process.pid)
    try:
        up = leaks.until(lambda: _ended(process) or _answers(server), TIMEOUT_S)
        up = up and not _ended(process)
        assert up, log.read_text(encoding="utf-8")
        yield server
    finally:
        noted = [traces.Traces.of(pid) for pid in server.kernels()]
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()
        for kernel in noted:
            kernel.assert_dead()


def _ended(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is not None


def _answers(server: Server) -> bool:
    try:
        with urlopen(server.address("/api/status"), timeout=5) as answer:
            return answer.status == 200
    except (URLError, OSError):
        return False


class Notebook:
    """One notebook in a page."""

    def __init__(self, page: Page) -> None:
        self.page = page

    @property
    def cells(self) -> Locator:
        return self.page.locator(".jp-Notebook .jp-CodeCell")

    def output(self, index: int) -> Locator:
        """Give the outputs of a cell."""
        return self.cells.nth(index).locator(".jp-Cell-outputArea")

    def editor(self, index: int) -> Locator:
        """Give the text of a cell."""
        return self.cells.nth(index).locator(".cm-content")

    def type(self, index: int, text: str, key: str) -> None:
        """Put text into an empty cell, as from the clipboard, and press a key."""
        self.editor(index).focus()
        self.page.keyboard.insert_text(text)
        expect(self.editor(index)).to_contain_text(text)
        self.editor(index).press(key)

    def start(self, index: int) -> None:
        """Run a cell, and do not wait for it."""
        self.editor(index).press("Control+Enter")
        # Its number goes, or becomes a star, before any new one comes.
        expect(self.prompt(index)).to_have_text(re.compile(r"\[(\*|\d+)\]:"))

    def prompt(self, index: int) -> Locator:
        """Give the number in front of a cell."""
        return self.cells.nth(index).locator(".jp-InputArea-prompt")

    def ended(self, index: int) -> None:
        """Wait until a cell has its number."""
        expect(self.prompt(index)).to_have_text(re.compile(r"\[\d+\]:"))

    def run(self, *indices: int) -> None:
        """Run cells that were not run before, one after the other."""
        for index in indices:
            self.start(index)
            self.ended(index)

    def press(self, item: str) -> None:
        """Press a button of the notebook's toolbar."""
        self.page.locator(f'.jp-NotebookPanel-toolbar [data-jp-item-name="{item}"]').locator(
            "jp-button, button"
        ).first.click()

    def restart(self) -> None:
        """Press the button that restarts the kernel, agree, and wait for the new one."""
        self.page.evaluate(
            f"window.states = []; {KERNEL}.statusChanged.connect((_, s) => window.states.push(s))"
        )
        self.press("restart")
        self.page.locator(".jp-Dialog .jp-mod-accept").click()
        self.page.wait_for_function("window.states.includes('restarting')")
        wait_until_idle(self.page)


def write(server: Server, name: str, sources: tuple[str, ...]) -> None:
    """Put a notebook into the server's folder."""
    cells = [v4.new_code_cell(source) for source in sources]
    kernel = {"name": NAME, "display_name": DISPLAY_NAME, "language": "python"}
    nb = v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(nb, server.folder / f"{name}.ipynb")


def open_notebook(page: Page, server: Server, name: str) -> Notebook:
    """Show a notebook alone in the page; give it when its kernel is idle."""
    page.goto(server.address(f"/doc/tree/{name}.ipynb"))
    wait_until_idle(page)
    return Notebook(page)


def comes(locator: Locator, *, within_s: float) -> bool:
    """Tell whether something can be seen within a time."""
    try:
        expect(locator).to_be_visible(timeout=1000 * within_s)
    except AssertionError:
        return False
    return True


def wait_until_idle(page: Page) -> None:
    """Wait until the page has its shortcuts, and its notebook a kernel that has nothing to do."""
    page.wait_for_function("window.jupyterapp")
    page.evaluate("window.jupyterapp.restored")
    page.wait_for_function(
        f"() => {{ const kernel = {KERNEL}; return kernel && kernel.status === 'idle'"
        " && kernel.connectionStatus === 'connected'; }"
    )
