"""`--chmod` and `--chown`: the permissions and owners that copied files get."""

from __future__ import annotations

import re
from collections.abc import Callable

from sandbox_kernel.errors import BuildError, ImageError
from sandbox_kernel.image.accounts import find_account, find_id, find_owner
from sandbox_kernel.image.view import View

Chmod = Callable[[int, bool], int]
"""From the permissions of a file, and whether it is a folder, to its new ones."""

_OCTAL = re.compile(r"[0-7]{1,5}", re.ASCII)
_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=](?:[ugo]|[rwxXst]*))+)", re.ASCII)
_ACTION = re.compile(r"([-+=])([ugo]|[rwxXst]*)", re.ASCII)
_SHIFTS = {"u": 6, "g": 3, "o": 0}
_BITS = {"r": 4, "w": 2, "x": 1}


def parse_chmod(text: str) -> Chmod:
    """Read octal permissions or chmod(1)'s symbolic ones, `u=rwX,go=rX`; raises BuildError."""
    if _OCTAL.fullmatch(text) and int(text, 8) <= 0o7777:
        mode = int(text, 8)
        return lambda _mode, _is_folder: mode
    clauses = [_CLAUSE.fullmatch(part) for part in text.split(",")]
    if not all(clauses):
        raise BuildError(
            f"--chmod={text}", hint="write octal digits up to 7777, or u=rwX,go=rX as chmod(1)"
        )
    parsed = [(match[1] or "a", _ACTION.findall(match[2])) for match in clauses if match]

    def change(mode: int, is_folder: bool) -> int:  # noqa: FBT001 - of the type above
        for who, actions in parsed:
            for operator, what in actions:
                mode = _changed(mode, who.replace("a", "ugo"), (operator, what), folder=is_folder)
        return mode

    return change


def _changed(mode: int, who: str, action: tuple[str, str], *, folder: bool) -> int:
    operator, what = action
    bits = sum(_bits(mode, what, folder=folder) << _SHIFTS[one] for one in set(who))
    bits |= (0o4000 if "u" in who else 0) | (0o2000 if "g" in who else 0) if "s" in what else 0
    bits |= 0o1000 if "t" in what else 0
    if operator == "+":
        return mode | bits
    if operator == "-":
        return mode & ~bits
    cleared = sum(7 << _SHIFTS[one] for one in set(who))
    cleared |= (0o4000 if "u" in who else 0) | (0o2000 if "g" in who else 0)
    # A folder keeps its set-id bits unless they are named, as chmod(1) does it.
    return (mode & ~(cleared & 0o777 if folder else cleared)) | bits


def _bits(mode: int, what: str, *, folder: bool) -> int:
    if what in _SHIFTS:
        return mode >> _SHIFTS[what] & 7
    bits = sum(_BITS[char] for char in set(what) if char in _BITS)
    return bits | 1 if "X" in what and (folder or mode & 0o111) else bits


def parse_chown(text: str, view: View) -> tuple[int, int]:
    """Give the ids of `USER[:GROUP]` by the image's own tables; raises BuildError.

    A user's name alone stands for his first group too, a number alone for the group of that
    number.
    """
    user, colon, group = text.partition(":")
    try:
        if not user and not colon:
            raise BuildError("--chown comes out empty", hint="write --chown=USER:GROUP")
        if colon:
            return find_owner(view, f"{user or 0}:{group or 0}")
        if user.isascii() and user.isdigit():
            number = find_id(user, [], "user", text)
            return number, number
        account = find_account(view, user)
    except BuildError:
        raise
    except ImageError as error:
        raise BuildError(f"--chown={text}: {error.message}", hint=error.hint) from error
    return account.uid, account.gid
