"""Speak to a program that runs elsewhere on this machine: as another user, in a unit, in less."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[3]

Json = dict[str, Any]


class Program:
    """A program that answers lines of JSON; it says one line of its own first."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = shlex.join(argv)
        self._process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=SOURCE
        )
        self.begun = self.answer()

    def send(self, request: object) -> None:
        """Ask for something, and do not wait."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def answer(self) -> Json:
        """Wait for what came of it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it has ended with {self.close()}: {self._argv}"
        facts: Json = json.loads(line)
        return facts

    def run(self, code: str) -> Json:
        """Run a cell to its end."""
        self.send(code)
        return self.answer()

    def close(self) -> int:
        """End it; give the exit status."""
        self._process.communicate()
        return self._process.returncode


def module(name: str) -> list[str]:
    """Give the command that runs a module of this folder."""
    return [sys.executable, "-m", f"tests.vm.inside.{name}"]


def login(user: str, argv: Sequence[str]) -> list[str]:
    """Give the command that runs another in a login of a user."""
    return ["su", "--login", user, "--command", f"cd {SOURCE} && exec {shlex.join(argv)}"]


def behind(script: str, argv: Sequence[str]) -> list[str]:
    """Give the command that runs another when a script has gone well."""
    return ["sh", "-ec", f'{script}\nexec "$@"', "sh", *argv]


def apart(script: str, argv: Sequence[str], *options: str) -> list[str]:
    """Give the command that does so in a mount namespace; `options` are unshare(1)'s."""
    return ["unshare", "--mount", *options, *behind(script, argv)]
