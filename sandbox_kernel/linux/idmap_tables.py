"""Read /etc/subuid and /etc/subgid: which ids an ordinary user may map; see subuid(5).

Stricter than newuidmap, which lets two users share ids where the tables do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from sandbox_kernel.errors import HostError

Range = tuple[int, int]
"""First id and count."""

NEEDED = 1023
"""All ids of a session but the cell's, which is the user's own."""
LAST_ID = (1 << 32) - 2
"""The highest there is; the number after it means none (setresuid(2))."""
USUAL_FIRST, USUAL_COUNT = 100000, 65536
"""What useradd gives its first user."""


def ranges(
    text: str, *, table: str, uid: int, name: str, taken: Collection[int] | None = None
) -> tuple[Range, ...]:
    """Give this user's ranges in the text of a table, sorted, with those that touch made one.

    `taken` are ids that somebody has already (left out: `uid` alone). Raises HostError that names
    table and line where there are none or too few, and where one of them is malformed or not
    this user's alone; a malformed line of others is ignored.
    """
    taken = {uid} if taken is None else taken
    owners = {str(uid), name} - {""}
    own, others = _split(text, table, owners)
    who = " or ".join(sorted(owners))
    advice = _adding(name or str(uid), table, [*own.values(), *others.values()], taken)
    if not own:
        raise HostError(f"{table} has no range for {who}", hint=advice)
    for line, found in own.items():
        _check_alone(line, found, others, taken)
    merged = _merged(own.values())
    total = sum(count for _, count in merged)
    if total < NEEDED:
        lines = " and ".join(own)
        raise HostError(f"{lines}: {total} ids for {who} are less than {NEEDED}", hint=advice)
    return merged


def _split(text: str, table: str, owners: set[str]) -> tuple[dict[str, Range], dict[str, Range]]:
    """Give the ranges of `owners` and those of others, each by what to call its line."""
    own: dict[str, Range] = {}
    others: dict[str, Range] = {}
    for number, line in enumerate(text.split("\n"), 1):
        owner, _, rest = line.strip().partition(":")
        parsed = _parsed(rest)
        called = f"{table}, line {number}"
        if owner in owners:
            if parsed is None:
                raise HostError(
                    f"{called}: {line.strip()!r} is not NAME:FIRST:COUNT with ids up to {LAST_ID}",
                    hint="mend that line, as root",
                )
            own[called] = parsed
        elif parsed is not None and owner and not owner.startswith("#"):
            others[f"{called}, of {owner}"] = parsed
    return own, others


def _adding(owner: str, table: str, known: list[Range], taken: Collection[int]) -> str:
    """Say how to add a range that nobody has."""
    first = max([USUAL_FIRST, *(start + count for start, count in known)])
    for number in sorted(taken):
        if first <= number < first + USUAL_COUNT:
            first = number + 1
    line = f"{owner}:{first}:{USUAL_COUNT}"
    return f"as root add ids that nobody has to both tables: echo {line} >> {table}"


def _parsed(rest: str) -> Range | None:
    """Parse FIRST:COUNT; None where that is no range of ids."""
    first, colon, count = rest.partition(":")
    # A number of more digits is none, and would cost time to read.
    if not colon or not all(
        part.isascii() and part.isdigit() and len(part) <= 20 for part in (first, count)
    ):
        return None
    start, size = int(first), int(count)
    return (start, size) if size and start + size - 1 <= LAST_ID else None


def _check_alone(line: str, own: Range, others: dict[str, Range], taken: Collection[int]) -> None:
    """Refuse a range that somebody else has a part of: two users would share ids."""
    start, count = own
    shown = f"the ids {start} to {start + count - 1}"
    for other, (first, size) in others.items():
        if first < start + count and start < first + size:
            raise HostError(
                f"{line}: {shown} overlap those of {other}",
                hint="give each user ids of his own, as root",
            )
    inside = [number for number in taken if start <= number < start + count]
    if inside:
        raise HostError(
            f"{line}: {shown} hold {min(inside)}, which is somebody's own",
            hint="give this user ids that nobody has, as root",
        )


def _merged(found: Iterable[Range]) -> tuple[Range, ...]:
    """Sort ranges, and make those one that overlap or touch."""
    merged: list[Range] = []
    for start, count in sorted(found):
        if merged and start <= sum(merged[-1]):
            first, size = merged[-1]
            merged[-1] = (first, max(size, start + count - first))
        else:
            merged.append((start, count))
    return tuple(merged)


def taken_ids(text: str) -> Iterator[int]:
    """Give the third fields of passwd(5) or group(5): ids that people have."""
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) > 2 and fields[2].isascii() and fields[2].isdigit():
            yield int(fields[2])


def user_name(uid: int) -> str:
    """Give the name of a user; empty for one without, as containers have them."""
    import pwd  # noqa: PLC0415 - of use to ordinary users only

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return ""


def read(path: str) -> str:
    """Give the text of a table, empty where there is none; raises HostError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise HostError(f"{path} cannot be read: {error.strerror}") from error
