"""The chain of committed layers, where a cell is rolled back after its files were committed."""

from __future__ import annotations

import pytest

from sandbox_kernel.container import layers
from sandbox_kernel.container.layers import Layers


@pytest.fixture
def chain(monkeypatch: pytest.MonkeyPatch) -> Layers:
    """Give three layers, newest first: of both roots, of /workspace alone, and of / alone."""
    written = {"/s/1/u", "/s/2/x", "/s/3/u", "/s/3/x"}
    monkeypatch.setattr(layers, "_has_entries", lambda folder: folder in written)
    body = {
        "targets": [],
        "bound": [],
        "layers": [],
        "tmpfs": [],
        "cell_uid": 1000,
        "cell_gid": 1000,
        "workspace": "/notebooks",
        "workspace_mode": "overlay",
    }
    made = Layers(body)
    assert [made.commit(layer) for layer in (1, 2, 3, 4)] == [True, True, True, False]
    return made


def test_the_newest_layer_can_be_forgotten(chain: Layers) -> None:
    assert chain.chains() == ((3, 1), (3, 2))
    chain.forget(3)
    assert chain.chains() == ((1,), (2,))


@pytest.mark.parametrize("layer", [4, 7])
def test_to_forget_what_is_no_layer_changes_nothing(chain: Layers, layer: int) -> None:
    chain.forget(layer)
    assert chain.chains() == ((3, 1), (3, 2))


def test_a_merge_of_what_was_forgotten_meanwhile_is_thrown_away(chain: Layers) -> None:
    merging = chain.chains()
    chain.forget(3)
    assert chain.replace(9, merging) == [9]
    assert chain.chains() == ((1,), (2,))


def test_a_merge_takes_the_place_of_its_chain(chain: Layers) -> None:
    assert chain.replace(9, ((1,), (2,))) == [1, 2]
    assert chain.chains() == ((3, 9), (3, 9))
