"""Builds of an ordinary user: owners last from step to step.

Root's layers have real owners. A user with one id has no others, and can only keep a record.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.errors import BuildError
from sandbox_kernel.image import store_files
from sandbox_kernel.image.prune import PruneOptions
from tests.integration import leaks
from tests.integration.builds import BASE, WAIVED, Workshop, needs_busybox

pytestmark = [
    pytest.mark.skipif(os.geteuid() == 0, reason="root's layers have real owners"),
    needs_busybox,
]
ranged = pytest.mark.needs("subordinate_ids")

APP = 1234


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    before = leaks.Snapshot()
    shop = Workshop(tmp_path / "shop", WAIVED)
    shop.add_base()
    yield shop
    shop.close()
    # pytest cannot: what belongs to other ids is removed by a child that has them.
    store_files.remove(shop.root)
    before.assert_clean()


def owners(shop: Workshop, text: str) -> dict[str, tuple[int, int]]:
    """Build; give the owners that the topmost layer says."""
    layer = shop.layer(shop.build(f"FROM {BASE}\n{text}"))
    return {name: (one.uid, one.gid) for name, one in layer.items()}


def said(shop: Workshop, text: str) -> list[str]:
    return shop.run(text).splitlines()


@ranged
def test_a_user_writes_into_the_folder_that_an_earlier_step_gave_him(shop: Workshop) -> None:
    shown = said(
        shop,
        "RUN mkdir /srv/app && chown app /srv/app && chmod 700 /srv/app\n"
        "USER app\n"
        "RUN touch /srv/app/x && stat -c '%n %u:%g' /srv/app /srv/app/x\n"
        "RUN echo more >> /srv/app/x && stat -c '%n %u:%g' /srv/app/x",
    )
    assert shown == [f"/srv/app {APP}:0", f"/srv/app/x {APP}:1235", f"/srv/app/x {APP}:1235"]


@ranged
def test_what_is_anothers_alone_stays_out_of_reach(shop: Workshop) -> None:
    text = "RUN mkdir /srv/own && echo s > /srv/own/s && chmod 700 /srv/own && chown 7:7 /srv/own\n"
    with pytest.raises(BuildError):
        shop.run(text + "USER app\nRUN cat /srv/own/s")
    assert "Permission denied" in shop.told.out("stderr")


@ranged
def test_steps_see_the_owner_that_was_named_and_else_root(shop: Workshop) -> None:
    shop.write({"f": "content"})
    shown = said(
        shop,
        "COPY f /srv/plain\nCOPY --chown=app:staff f /srv/app\n"
        "RUN stat -c '%n %u:%g' /srv /srv/plain /srv/app",
    )
    assert shown == ["/srv 0:0", "/srv/plain 0:0", f"/srv/app {APP}:50"]


@ranged
def test_a_later_chown_wins_also_the_one_to_root(shop: Workshop) -> None:
    first = "RUN for f in a b c; do echo $f > /srv/$f; chown 33:33 /srv/$f; done\n"
    second = "RUN chown 5:5 /srv/a && chown 0:0 /srv/b && echo more >> /srv/c\n"
    found = owners(shop, first + second)
    assert found["srv/a"] == (5, 5)
    assert found["srv/b"] == (0, 0)
    assert found["srv/c"] == (33, 33)
    shown = said(shop, f"{first}{second}RUN stat -c '%u:%g' /srv/a /srv/b /srv/c")
    assert shown == ["5:5", "0:0", "33:33"]


@ranged
def test_what_a_layer_hides_stays_hidden(shop: Workshop) -> None:
    shown = said(
        shop,
        "RUN mkdir -p /srv/d/sub && touch /srv/d/old /srv/d/sub/old /srv/gone && "
        "chown -R 33:33 /srv/d /srv/gone\n"
        "RUN rm -r /srv/d && mkdir /srv/d && touch /srv/d/new && chown 34:34 /srv/d /srv/d/new && "
        "rm /srv/gone\n"
        "RUN find /srv | sort && stat -c '%u:%g' /srv/d",
    )
    assert shown == ["/srv", "/srv/d", "/srv/d/new", "34:34"]


@ranged
def test_modes_links_and_content_come_through(shop: Workshop) -> None:
    shown = said(
        shop,
        "RUN cd /srv && mkdir s && chown 0:50 s && chmod 2775 s && echo data > one && "
        "ln one two && ln -s one link && chown 33:50 one && chmod 4751 one\n"
        "RUN cd /srv && stat -c '%n %a %u:%g' s one two && cat two link && "
        "touch s/new && stat -c '%g' s/new && [ one -ef two ] && echo same",
    )
    assert shown == [
        "s 2775 0:50", "one 4751 33:50", "two 4751 33:50", "data", "data", "50", "same",
    ]  # fmt: skip


@ranged
def test_owners_of_a_stage_are_copied(shop: Workshop) -> None:
    shop.build(
        f"FROM {BASE} AS first\nRUN mkdir /srv/d && touch /srv/d/f && chown -R 33:34 /srv/d\n"
        f"FROM {BASE}\nCOPY --from=first /srv/d /srv/d\nRUN stat -c '%u:%g' /srv/d /srv/d/f"
    )
    assert shop.told.out().splitlines() == ["0:0", "33:34"]


@ranged
def test_an_id_beyond_the_users_own_lasts_until_it_is_changed(shop: Workshop) -> None:
    shop.write({"f": "content"})
    first = "COPY --chown=70000:70001 f /srv/f\nCOPY --chown=70000:70001 f /srv/g\n"
    second = "RUN stat -c '%u:%g' /srv/f && echo more >> /srv/f && chown 5:6 /srv/g"
    found = owners(shop, first + second)
    assert shop.told.out().splitlines() == ["0:0"]
    assert (found["srv/f"], found["srv/g"]) == ((70000, 70001), (5, 6))


@ranged
def test_a_prune_leaves_nothing_of_other_ids(shop: Workshop) -> None:
    shop.run("RUN mkdir /srv/d && touch /srv/d/f && chown -R 33:33 /srv/d\nRUN ls /srv/d/f")
    assert list(shop.store.folder.glob("layers/sha256/*/owned/fs/srv/d"))
    for image in shop.store.images():
        shop.store.untag(image.digest, force=True)
    shop.store.prune(PruneOptions(all_images=True, build_cache=True))
    assert (shop.folders(), shop.blobs()) == (set(), set())


def test_a_record_lasts_though_a_step_changes_the_file(shop: Workshop) -> None:
    shop.write({"f": "content"})
    found = owners(shop, "COPY --chown=33:34 f /srv/f\nRUN echo more >> /srv/f && chmod 600 /srv/f")
    assert found["srv/f"] == (33, 34)


def test_copied_files_are_roots_whoever_builds(shop: Workshop) -> None:
    shop.write({"f": "content"})
    assert set(owners(shop, "COPY f /srv/plain").values()) == {(0, 0)}
    assert set(owners(shop, "WORKDIR /srv/new").values()) == {(0, 0)}
