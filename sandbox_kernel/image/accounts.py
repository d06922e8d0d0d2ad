"""Users and groups as an image names them: its passwd(5) and group(5).

What stands in there is the image's word: lines that cannot be read are passed over, numbers out of
range are errors, and nothing wraps around (CVE-2024-40635).
"""

from __future__ import annotations

from dataclasses import dataclass

from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.view import View

TABLE_BYTES = 1 << 20
LAST_ID = (1 << 32) - 2
"""The highest there is; the number after it means none (setresuid(2))."""


@dataclass(frozen=True)
class Account:
    """Whom a process runs as."""

    uid: int
    gid: int
    name: str = ""
    home: str = ""
    groups: tuple[int, ...] = ()
    """Groups beside the first."""


def find_account(view: View, user: str) -> Account:
    """Give who `user` is, as USER of a Dockerfile has it: NAME|UID[:GROUP|GID].

    A number counts as one even where a user of that name is. Raises ImageError.
    """
    name, colon, group = user.partition(":")
    users, groups = _table(view, "/etc/passwd"), _table(view, "/etc/group")
    account = _account(name, users, groups, user)
    if not colon:
        return account
    return Account(account.uid, find_id(group, groups, "group", user), account.name, account.home)


def find_owner(view: View, owner: str) -> tuple[int, int]:
    """Give the ids of USER[:GROUP] as --chown has it; a user alone is his group too.

    Raises ImageError.
    """
    name, colon, group = owner.partition(":")
    uid = find_id(name, _table(view, "/etc/passwd"), "user", owner)
    if not colon:
        group = name
    return uid, find_id(group, _table(view, "/etc/group"), "group", owner)


def _account(name: str, users: list[list[str]], groups: list[list[str]], written: str) -> Account:
    uid = find_id(name, users, "user", written)
    row = next((row for row in users if row[0] == name or _number(row[2]) == uid), None)
    if row is None:
        return Account(uid, 0)
    gid = _number(row[3]) if len(row) > 3 else None
    members = tuple(
        number
        for line in groups
        if len(line) > 3 and row[0] in line[3].split(",") and (number := _number(line[2]))
    )
    home = row[5] if len(row) > 5 else ""
    return Account(uid, gid or 0, row[0], home, members)


def find_id(name: str, table: list[list[str]], what: str, written: str) -> int:
    """Give the number of a name, or the number itself; raises ImageError."""
    if name.isascii() and name.isdigit():
        number = _number(name)
        if number is None:
            raise ImageError(
                f"{what} {name} of {written!r} is out of range", hint=f"the highest is {LAST_ID}"
            )
        return number
    for row in table:
        if row[0] == name and (number := _number(row[2])) is not None:
            return number
    file = "/etc/passwd" if what == "user" else "/etc/group"
    raise ImageError(
        f"there is no {what} {name!r} in the image's {file}",
        hint=f"create it in the image (RUN {what}add {name or 'NAME'}), or give its number",
    )


def _number(text: str) -> int | None:
    if not (text.isascii() and text.isdigit() and len(text) <= 10):
        return None
    return number if (number := int(text)) <= LAST_ID else None


def _table(view: View, path: str) -> list[list[str]]:
    text = view.read(path, TABLE_BYTES).decode("utf-8", "replace")
    rows = [line.split(":") for line in text.split("\n")]
    return [row for row in rows if len(row) >= 3]
