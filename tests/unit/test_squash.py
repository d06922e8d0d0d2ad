"""Merging layers: the one folder shows what the chain showed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox_kernel.container.squash import OPAQUE, squash


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    found = [tmp_path / name for name in ("new", "old", "merged")]
    for folder in found:
        folder.mkdir()
    try:
        os.setxattr(found[0], "user.tried", b"1")
    except OSError:
        pytest.skip("needs a file system with user attributes")
    os.removexattr(found[0], "user.tried")
    return found


def merge(layers: list[Path]) -> Path:
    new, old, merged = layers
    squash([str(new), str(old)], str(merged))
    return merged


def test_an_attribute_that_the_newer_layer_dropped_is_gone(layers: list[Path]) -> None:
    new, old, _ = layers
    for folder in (new, old):
        (folder / "a").mkdir()
    os.setxattr(old / "a", "user.gone", b"1")
    os.setxattr(new / "a", "user.new", b"2")
    assert os.listxattr(merge(layers) / "a") == ["user.new"]


def test_an_opaque_folder_hides_and_stays_opaque(layers: list[Path]) -> None:
    new, old, _ = layers
    for folder, name in ((new, "y"), (old, "x")):
        (folder / "a").mkdir()
        (folder / "a" / name).touch()
    os.setxattr(new / "a", OPAQUE, b"y")
    merged = merge(layers)
    assert os.listdir(merged / "a") == ["y"]
    assert os.getxattr(merged / "a", OPAQUE) == b"y"
