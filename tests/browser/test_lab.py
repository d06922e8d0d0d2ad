"""What a user does in JupyterLab, with mouse and keyboard in a real browser."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.browser import lab
from tests.browser.lab import Notebook, Server

pytestmark = [
    pytest.mark.browser,
    pytest.mark.kernel,
    pytest.mark.slow,
    pytest.mark.needs("kernel"),
    pytest.mark.timeout(300),
]

Open = Callable[..., Notebook]


def test_the_launcher_starts_the_kernel(server: Server, page: Page) -> None:
    page.goto(server.address("/lab"))
    page.locator(f'.jp-LauncherCard[title="{lab.DISPLAY_NAME}"]').first.click()
    lab.wait_until_idle(page)
    expect(page.locator(".jp-Toolbar-kernelName")).to_have_text(lab.DISPLAY_NAME)
    shown = Notebook(page)
    shown.type(0, "import os; print(6 * 7, os.getuid(), os.getcwd())", "Shift+Enter")
    expect(shown.output(0)).to_have_text("42 1000 /workspace")
    shown.type(1, "1 / 0", "Shift+Enter")
    expect(shown.output(1)).to_contain_text("ZeroDivisionError: division by zero")


def test_a_memory_limit_is_shown_and_survived(notebook: Open) -> None:
    shown = notebook(
        "marks = {'ada': 1.0, 'grace': 1.3}\nprint('ready')",
        "%%sandbox memory=128M\nmarks['mallory'] = 5.0\nhog = []\n"
        "while True:\n    hog.append(bytearray(16 << 20))",
        "print(marks)",
    )
    shown.run(0, 1, 2)
    expect(shown.output(1)).to_contain_text("MemoryLimitExceeded")
    expect(shown.output(1)).to_contain_text("the session is as it was before this cell")
    expect(shown.output(2)).to_have_text("{'ada': 1.0, 'grace': 1.3}")


def test_a_crash_is_shown_and_survived(notebook: Open) -> None:
    shown = notebook("x = 41", "x = 0\nimport ctypes\nctypes.string_at(0)", "x + 1")
    shown.run(0, 1, 2)
    expect(shown.output(1)).to_contain_text("CellCrashed")
    expect(shown.output(1)).to_contain_text("SIGSEGV")
    expect(shown.output(2)).to_contain_text("42")
    expect(shown.page.locator(".jp-Dialog")).to_have_count(0)


def test_the_stop_button(notebook: Open) -> None:
    shown = notebook("print('running')\nkept = 1\nwhile True: pass", "print('kept is', kept)")
    shown.start(0)
    expect(shown.output(0)).to_contain_text("running")
    expect(shown.prompt(0)).to_have_text("[*]:")
    shown.press("interrupt")
    expect(shown.output(0)).to_contain_text("KeyboardInterrupt")
    shown.run(1)
    expect(shown.output(1)).to_have_text("kept is 1")


def test_a_slider(notebook: Open) -> None:
    shown = notebook(
        "import ipywidgets\n"
        "slider = ipywidgets.IntSlider(value=3, min=0, max=10, description='size')\n"
        "label = ipywidgets.Label('not moved')\n"
        "def moved(change):\n    label.value = f'moved to {change.new}'\n"
        "slider.observe(moved, 'value')\n"
        "ipywidgets.VBox([slider, label])",
        "print('the slider is at', slider.value)",
    )
    shown.run(0)
    handle = shown.output(0).locator(".noUi-handle")
    expect(handle).to_be_visible()
    expect(shown.output(0)).to_contain_text("not moved")
    handle.focus()
    for value in (4, 5, 6):
        shown.page.keyboard.press("ArrowRight")
        # The label is set by the handler in the sandbox: by now the variable has changed there.
        expect(shown.output(0)).to_contain_text(f"moved to {value}")
    shown.run(1)
    expect(shown.output(1)).to_have_text("the slider is at 6")


def test_interact_prints_into_its_widget(notebook: Open) -> None:
    shown = notebook(
        "import ipywidgets\n"
        "@ipywidgets.interact(x=(0, 10))\n"
        "def square(x=3):\n    print('the square is', x * x)"
    )
    shown.run(0)
    expect(shown.output(0)).to_contain_text("the square is 9")
    shown.output(0).locator(".noUi-handle").focus()
    shown.page.keyboard.press("ArrowRight")
    expect(shown.output(0)).to_contain_text("the square is 16")
    expect(shown.output(0)).not_to_contain_text("the square is 9")


def test_input_asks_in_the_cell(notebook: Open) -> None:
    shown = notebook("name = input('Who are you? ')\nprint('hello', name)", "name")
    shown.start(0)
    box = shown.output(0).locator("input.jp-Stdin-input")
    expect(box).to_be_visible()
    expect(shown.output(0)).to_contain_text("Who are you?")
    box.fill("ada")
    box.press("Enter")
    expect(shown.output(0)).to_contain_text("hello ada")
    shown.run(1)
    expect(shown.output(1)).to_contain_text("'ada'")


def test_rich_output(notebook: Open) -> None:
    shown = notebook(
        "from IPython.display import HTML, Markdown, display\n"
        "display(HTML('<table id=\"rich\"><tr><td>in a table</td></tr></table>'))\n"
        "display(Markdown('**bold** words'))",
        "%sandbox",
    )
    shown.run(0, 1)
    expect(shown.output(0).locator("table#rich td")).to_have_text("in a table")
    expect(shown.output(0).locator("strong")).to_have_text("bold")
    expect(shown.output(1).locator("table td").first).to_have_text("memory")
    expect(shown.output(1)).to_contain_text("512 MiB")


def test_completion_is_offered(notebook: Open) -> None:
    shown = notebook("a_long_variable_name = 1", "")
    shown.run(0)
    # JupyterLab waits one second for an answer and shows nothing if none has come by then; the
    # first takes longer here, as in every kernel, because jedi is loaded for it.
    shown.type(1, "a_long_va", "Tab")
    offer = shown.page.locator(".jp-Completer-item").first
    for _ in range(10):
        if lab.comes(offer, within_s=5):
            break
        shown.editor(1).press("Tab")
    expect(offer).to_contain_text("a_long_variable_name")
    shown.page.keyboard.press("Enter")
    expect(shown.editor(1)).to_have_text("a_long_variable_name")


def test_restart(notebook: Open) -> None:
    shown = notebook("x = 1\nprint('set')", "'x' in globals()")
    shown.run(0)
    shown.restart()
    shown.start(1)
    expect(shown.output(1)).to_contain_text("False")
    expect(shown.prompt(1)).to_have_text("[1]:")
