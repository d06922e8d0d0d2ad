"""Jupyter's own conformance suite, with the knobs that ipykernel sets for itself.

SANDBOX_KERNEL_NAME names an installed kernel to test, by default `sandbox-python`. Where that is
not installed, this checkout is tested through a kernelspec of the moment.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import ClassVar
from unittest import mock

import jupyter_kernel_test
import pytest
from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

pytestmark = [pytest.mark.conformance, pytest.mark.kernel]

ROOT = Path(__file__).resolve().parents[2]
NAME = os.environ.get("SANDBOX_KERNEL_NAME", "sandbox-python")


@pytest.fixture(scope="module", autouse=True)
def kernelspec():
    try:
        KernelSpecManager().get_kernel_spec(NAME)
    except NoSuchKernel:
        if "SANDBOX_KERNEL_NAME" in os.environ:
            raise
    else:
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels", NAME)
        target.mkdir(parents=True)
        spec = json.loads((ROOT / "kernelspec" / "kernel.json").read_text())
        spec["argv"][0] = sys.executable
        spec["env"] = {"PYTHONPATH": str(ROOT)}
        (target / "kernel.json").write_text(json.dumps(spec))
        with mock.patch.dict(os.environ, {"JUPYTER_PATH": folder}):
            yield


class TestKernel(jupyter_kernel_test.KernelTests):
    kernel_name = NAME
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples: ClassVar = [{"text": "zi", "matches": {"zip"}}]
    complete_code_samples: ClassVar = [
        "1",
        "print('hello, world')",
        "def f(x):\n  return x*2\n\n\n",
    ]
    incomplete_code_samples: ClassVar = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples: ClassVar = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise"
    code_execute_result: ClassVar = [
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
    ]
    code_display_data: ClassVar = [
        {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))",
         "mime": "text/html"},
        {"code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))",
         "mime": "text/latex"},
    ]  # fmt: skip
    code_history_pattern = "1?2*"
    # ipykernel leaves `range` out, since it fails there.
    supported_history_operations = ("tail", "range", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"


class TestIopubWelcome(jupyter_kernel_test.IopubWelcomeTests):
    kernel_name = NAME
    support_iopub_welcome = True
