"""Text of images for a terminal: without control characters, in columns, or as JSON.

What an image, a registry or a program of a build says may hold anything; a terminal obeys escape
sequences, and shows text with marks for direction in another order than it has.
"""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click

from sandbox_kernel.image.stored_image import StoredImage

VERSION = 1
"""Of the JSON documents; a new field does not change it."""
MAX_LINE = 4096
"""A longer line of a program is shown as several."""

_SEQUENCE = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, movements
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC and other strings: titles, clipboard
    r"|\x1b[ -/]*[0-~]?"
)
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def harmless(text: str) -> str:
    """Give a text that fits in a line: no escape sequence, no control character but the tab."""
    return _CONTROL.sub("", _SEQUENCE.sub("", text))


def one_line(text: str) -> str:
    """Give a text with all white space as single blanks, harmless."""
    return " ".join(harmless(" ".join(text.split())).split())


class Lines:
    """What comes over a stream, cut into harmless lines."""

    def __init__(self) -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._rest = ""

    def take(self, data: bytes) -> Iterator[str]:
        """Give the lines that are whole now."""
        *lines, self._rest = (self._rest + self._decode(data)).split("\n")
        while len(self._rest) > MAX_LINE:
            lines.append(self._rest[:MAX_LINE])
            self._rest = self._rest[MAX_LINE:]
        for line in lines:
            yield from self._cut(line)

    def end(self) -> Iterator[str]:
        """Give what came without a newline at its end."""
        rest, self._rest = self._rest + self._decode(b"", True), ""
        if rest:
            yield from self._cut(rest)

    @staticmethod
    def _cut(line: str) -> Iterator[str]:
        # A bar that is drawn again and again over itself: its last state counts.
        text = harmless(line.rstrip("\r").rpartition("\r")[2])
        yield from (text[at : at + MAX_LINE] for at in range(0, len(text) or 1, MAX_LINE))


def table(rows: Sequence[Sequence[str]]) -> str:
    """Give rows as columns, three blanks apart; the last column is not filled up."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=True)]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def short(digest: str) -> str:
    """Give the first twelve digits of a digest, as Docker shows them."""
    return digest.partition(":")[2][:12]


def document(content: dict[str, Any]) -> str:
    """Give the JSON document of a command."""
    return json.dumps({"version": VERSION, **content}, indent=2)


def image_json(image: StoredImage) -> dict[str, Any]:
    """Give an image as it stands in every JSON document."""
    return {
        "reference": image.reference.full if image.reference else None,
        "id": image.image_id,
        "digest": image.digest,
        "platform": str(image.config.platform),
        "created": image.created,
        "size_bytes": image.size_bytes,
        "layers": [layer.digest for layer in image.manifest.layers],
    }


def put(text: str, *, err: bool = False, newline: bool = True) -> None:
    """Print a text; what the encoding of the terminal lacks is replaced."""
    encoding = (sys.stderr if err else sys.stdout).encoding or "utf-8"
    click.echo(text.encode(encoding, "replace").decode(encoding), nl=newline, err=err)


def name_of(image: StoredImage) -> str:
    """Give the name of an image as people write it, or its ID if it has none."""
    return str(image.reference) if image.reference else short(image.image_id)
