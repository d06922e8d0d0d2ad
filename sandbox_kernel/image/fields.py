"""Fields of JSON documents that others wrote: each is checked where it is read."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sandbox_kernel.errors import ImageError
from sandbox_kernel.model import Json

MAX_DOCUMENT_BYTES = 4 << 20
"""Above this, registries refuse manifests; nobody's config is that large either."""
MAX_SIZE_BYTES = 1 << 53
"""Above this, JSON readers of other languages round."""


def parse_object(raw: bytes, what: str) -> Json:
    """Give the object of a document; raises ImageError, which calls the document `what`."""
    found = parse_json(raw, what)
    if not isinstance(found, dict):
        raise ImageError(f"{what} is not a JSON object")
    return found


def parse_objects(raw: bytes, what: str) -> tuple[Fields, ...]:
    """Give the objects of a document that is a list of them; raises ImageError."""
    return Fields({"list": parse_json(raw, what)}, what).objects("list")


def parse_json(raw: bytes, what: str) -> Any:
    """Give what stands in a document; raises ImageError, which calls the document `what`.

    A key that stands twice is refused: readers differ in which one they take.
    """
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise ImageError(f"{what} has {len(raw)} bytes", hint=f"at most {MAX_DOCUMENT_BYTES}")

    def pairs(items: list[tuple[str, Any]]) -> Json:
        seen = dict(items)
        if len(seen) != len(items):
            twice = next(key for key, _ in items if sum(key == other for other, _ in items) > 1)
            raise ImageError(f"{what} is ambiguous: the key {twice[:200]!r} stands there twice")
        return seen

    def constant(name: str) -> None:
        raise ImageError(f"{what} is not JSON: it holds {name}")

    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
        # Half of a surrogate pair can be escaped in JSON, but not written again.
        if b"\\u" in raw:
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise ImageError(f"{what} is not JSON: {str(error)[:200]}") from error
    return found


@dataclass(frozen=True)
class Fields:
    """The fields of one object, with the words by which an error names it.

    A field that is absent or null is empty; one of a wrong type raises ImageError.
    """

    values: Json
    what: str

    def text(self, key: str, default: str = "") -> str:
        """Give a text."""
        value: str = self._get(key, str, default)
        return value

    def size(self, key: str) -> int:
        """Give a count of bytes, which must be there."""
        value: int = self._get(key, int, -1)
        if isinstance(value, bool) or not 0 <= value <= MAX_SIZE_BYTES:
            raise ImageError(f"{self.what}: {key} is {self.values.get(key)!r}, not a size")
        return value

    def flag(self, key: str) -> bool:
        """Give a truth value."""
        return self._get(key, bool, False) is True

    def object(self, key: str) -> Fields:
        """Give an object."""
        return Fields(self._get(key, dict, {}), f"{self.what}, {key}")

    def objects(self, key: str) -> tuple[Fields, ...]:
        """Give a list of objects."""
        found = []
        for number, item in enumerate(self._get(key, list, [])):
            where = f"{self.what}, {key}[{number}]"
            if not isinstance(item, dict):
                raise ImageError(f"{where} is not an object")
            found.append(Fields(item, where))
        return tuple(found)

    def texts(self, key: str) -> tuple[str, ...]:
        """Give a list of texts."""
        return self._all_text(key, self._get(key, list, []))

    def pairs(self, key: str) -> tuple[tuple[str, str], ...]:
        """Give an object whose values are texts, as sorted pairs."""
        found: Json = self._get(key, dict, {})
        self._all_text(key, found.values())
        return tuple(sorted(found.items()))

    def names(self, key: str) -> tuple[str, ...]:
        """Give the keys of an object that is used as a set, sorted."""
        return tuple(sorted(self._get(key, dict, {})))

    def _get(self, key: str, kind: type, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise ImageError(f"{self.what}: {key} is not {_KINDS[kind]}")
        return value

    def _all_text(self, key: str, items: Iterable[Any]) -> tuple[str, ...]:
        found = tuple(items)
        for item in found:
            if not isinstance(item, str):
                raise ImageError(f"{self.what}: {key} holds {str(item)[:100]!r}, not a text")
        return found


_KINDS = {
    str: "a text",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
