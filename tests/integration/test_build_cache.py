"""The build cache: what is a hit, what is a miss, and the reason that a miss is told with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_kernel.build.explain import NEVER
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.prune import PruneOptions
from tests.integration.builds import BASE, Workshop, needs_busybox

pytestmark = [pytest.mark.needs("memory", "processes"), needs_busybox]

ROOT = Path(__file__).parents[2]
CHAIN = f"FROM {BASE}\nRUN echo a > /a\nRUN echo b > /b\nRUN echo c > /c\nRUN echo d > /d\n"
A, B, C, D = (f"RUN echo {name} > /{name}" for name in "abcd")


# A, B, C, D


def test_the_same_again_is_cached_to_the_last_step(shop: Workshop) -> None:
    first = shop.build(CHAIN)
    assert shop.told.rebuilt == [A, B, C, D]
    assert set(shop.told.reasons.values()) == {NEVER}
    second = shop.build(CHAIN)
    assert shop.told.rebuilt == []
    assert second.digest == first.digest


def test_a_change_of_the_last_line_rebuilds_the_last_step_only(shop: Workshop) -> None:
    first = shop.build(CHAIN)
    second = shop.build(CHAIN.replace("echo d", "echo D"))
    changed = "RUN echo D > /d"
    assert shop.told.rebuilt == [changed]
    assert shop.told.reasons == {changed: f"the instruction has changed, it was: {D}"}
    assert second.manifest.layers[:-1] == first.manifest.layers[:-1]
    assert shop.read(second, "/d") == "D\n"


def test_a_change_of_the_first_line_rebuilds_all(shop: Workshop) -> None:
    shop.build(CHAIN)
    shop.build(CHAIN.replace("echo a", "echo A"))
    changed = "RUN echo A > /a"
    assert shop.told.rebuilt == [changed, B, C, D]
    behind = f"it comes after a change: {changed}"
    assert shop.told.reasons == {
        changed: f"the instruction has changed, it was: {A}",
        B: behind,
        C: behind,
        D: behind,
    }


def test_a_change_in_the_middle_rebuilds_from_there(shop: Workshop) -> None:
    shop.build(CHAIN)
    shop.build(CHAIN.replace("echo c", "echo C"))
    assert shop.told.rebuilt == ["RUN echo C > /c", D]


def test_a_line_put_in_and_taken_out_again_finds_the_old_chain(shop: Workshop) -> None:
    first = shop.build(CHAIN)
    added = "RUN echo x > /x"
    shop.build(CHAIN.replace(B, f"{added}\n{B}"))
    assert shop.told.rebuilt == [added, B, C, D]
    assert shop.told.reasons[added] == "it is new in this Dockerfile"
    assert shop.told.reasons[B] == f"it comes after a change: {added}"
    assert shop.build(CHAIN).digest == first.digest
    assert shop.told.rebuilt == []


def test_a_line_left_out_is_told_by_those_behind_it(shop: Workshop) -> None:
    shop.build(CHAIN)
    shop.build(CHAIN.replace(f"{B}\n", ""))
    assert shop.told.rebuilt == [C, D]
    assert shop.told.reasons == {
        C: f"it no longer comes after: {B}",
        D: f"it no longer comes after: {B}",
    }


def test_lines_that_change_places_are_built_anew(shop: Workshop) -> None:
    shop.build(CHAIN)
    shop.build(CHAIN.replace(f"{C}\n{D}", f"{D}\n{C}"))
    assert shop.told.rebuilt == [D, C]


def test_blanks_and_comments_are_no_change(shop: Workshop) -> None:
    shop.build(CHAIN)
    shop.build("# a comment\n" + CHAIN.replace(B, f"\n# another\nrun   {B[4:]}\n"))
    assert shop.told.rebuilt == []


def test_a_failed_step_leaves_those_before_it_cached(shop: Workshop) -> None:
    with pytest.raises(
        BuildError, match=r"Dockerfile:4: .*did not complete successfully"
    ) as raised:
        shop.build(CHAIN.replace(C, "RUN echo c > /c; exit 3"))
    assert "exit code: 3" in raised.value.message
    assert shop.store.images()[0].reference is not None  # the base, and nothing of the failure
    assert len(shop.store.images()) == 1
    shop.build(CHAIN)
    assert shop.told.rebuilt == [C, D]


def test_a_failed_step_is_tried_again(shop: Workshop) -> None:
    wrong = f"FROM {BASE}\nRUN exit 1\n"
    for _ in range(2):
        with pytest.raises(BuildError, match="exit code: 1"):
            shop.build(wrong)
    assert shop.told.rebuilt == ["RUN exit 1"]


def test_a_step_that_changes_no_file_is_cached_and_has_no_layer(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN true\nRUN echo b > /b\n"
    image = shop.build(text)
    assert len(image.manifest.layers) == 2
    assert [row.empty_layer for row in image.config.history] == [False, True, False]
    shop.build(text)
    assert shop.told.rebuilt == []


def test_no_cache_builds_all_again_and_comes_to_the_same(shop: Workshop) -> None:
    first = shop.build(CHAIN)
    second = shop.build(CHAIN, use_cache=False)
    assert shop.told.rebuilt == [A, B, C, D]
    assert set(shop.told.reasons.values()) == {"--no-cache"}
    assert second.digest == first.digest


# Layers on disk


def test_images_with_a_common_prefix_share_its_layers_on_disk(shop: Workshop) -> None:
    first = shop.build(CHAIN, tag="one")
    shop.store.ensure_layers(first)
    blobs, folders = shop.blobs(), shop.folders()
    second = shop.build(CHAIN.replace("echo d", "echo D"), tag="two")
    shop.store.ensure_layers(second)
    assert first.manifest.layers[:4] == second.manifest.layers[:4]
    assert len(shop.folders() - folders) == 1
    # Its layer, its config, its manifest.
    assert len(shop.blobs() - blobs) == 3


def test_a_layer_of_the_same_content_is_kept_once(shop: Workshop) -> None:
    shop.write({"f": "same"})
    copied = shop.build("FROM scratch\nCOPY f /f\n")
    again = shop.build('FROM scratch\nENV A=1\nCOPY f /f\nCMD ["x"]\n')
    assert copied.manifest.layers == again.manifest.layers
    assert copied.image_id != again.image_id


# COPY


def test_copy_is_a_hit_for_the_same_content_whatever_time_and_owner(shop: Workshop) -> None:
    shop.write({"app/one.py": "1", "app/two.py": "2"})
    text = "FROM scratch\nCOPY app /app\n"
    first = shop.build(text)
    for name in ("app", "app/one.py", "app/two.py"):
        path = shop.context / name
        os.utime(path, (1_000_000_000, 1_000_000_000))
        if os.geteuid() == 0:
            os.chown(path, 4321, 4321)
    moved = shop.context / "app/one.py"
    moved.rename(shop.root / "aside")
    moved.write_text("1")
    assert shop.build(text).digest == first.digest
    assert shop.told.rebuilt == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("echo 3 > app/two.py", "app/two.py changed"),
        ("chmod 755 app/one.py", "app/one.py changed"),
        ("echo x > app/new.py", "app/new.py is new"),
        ("rm app/two.py", "app/two.py is gone"),
        ("mv app/two.py app/zwei.py", "app/zwei.py is new, app/two.py is gone"),
        ("ln -sf one.py app/two.py", "app/two.py changed"),
    ],
)
def test_copy_is_a_miss_that_names_the_file(shop: Workshop, change: str, why: str) -> None:
    shop.write({"app/one.py": "1", "app/two.py": "2"})
    text = "FROM scratch\nCOPY app /app\n"
    shop.build(text)
    subprocess.run(["sh", "-ec", change], cwd=shop.context, check=True)
    shop.build(text)
    assert shop.told.reasons == {"COPY app /app": why}


def test_many_changed_files_are_counted(shop: Workshop) -> None:
    shop.write({f"f{number}": "1" for number in range(8)})
    shop.build("FROM scratch\nCOPY . /\n")
    shop.write({f"f{number}": "2" for number in range(8)})
    shop.build("FROM scratch\nCOPY . /\n")
    names = ", ".join(f"f{number} changed" for number in range(5))
    assert shop.told.reasons == {"COPY . /": f"{names} and 3 more"}


def test_what_is_ignored_changes_nothing(shop: Workshop) -> None:
    shop.write({"keep": "1", "log/a": "1", ".dockerignore": "log\n.dockerignore\n"})
    text = "FROM scratch\nCOPY . /app/\n"
    shop.build(text)
    shop.write({"log/a": "2", "log/b": "3"})
    shop.build(text)
    assert shop.told.rebuilt == []
    shop.write({".dockerignore": "log\n.dockerignore\nkeep\n"})
    shop.build(text)
    assert shop.told.reasons == {"COPY . /app/": "keep is gone"}


def test_another_owner_or_destination_is_a_miss(shop: Workshop) -> None:
    shop.write({"f": "1"})
    shop.build("FROM scratch\nCOPY f /f\n")
    shop.build("FROM scratch\nCOPY f /g\n")
    assert shop.told.reasons == {"COPY f /g": "the instruction has changed, it was: COPY f /f"}
    shop.build("FROM scratch\nCOPY --chown=5:6 f /g\n")
    assert shop.told.rebuilt == ["COPY --chown=5:6 f /g"]


def test_copy_of_a_stage_is_a_hit_if_the_files_are_the_same(shop: Workshop) -> None:
    text = f"FROM {BASE} AS one\nRUN echo VALUE > /tmp/x; echo x > /out\nFROM scratch\nCOPY --from=one /out /\n"
    shop.build(text)
    shop.build(text.replace("VALUE", "other"))
    assert shop.told.rebuilt == ["RUN echo other > /tmp/x; echo x > /out"]


# Variables


def test_env_is_a_change_for_what_follows(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN echo a > /a\nENV WHO=me\nRUN echo $WHO > /b\nRUN echo c > /c\n"
    shop.build(text)
    shop.build(text.replace("me", "you"))
    said = "RUN echo $WHO > /b"
    assert shop.told.rebuilt == [said, "RUN echo c > /c"]
    assert shop.told.reasons[said] == "the value of WHO has changed"


def test_the_order_of_variables_is_no_change(shop: Workshop) -> None:
    shop.build(f"FROM {BASE}\nENV A=1\nENV B=2\nRUN true\n")
    shop.build(f"FROM {BASE}\nENV B=2\nENV A=1\nRUN true\n")
    assert shop.told.rebuilt == []


def test_a_mount_that_is_new_or_gone_is_a_change(shop: Workshop) -> None:
    line = "RUN --mount=type=cache,target=${AT} true"
    text = f"FROM {BASE}\nARG AT=/c\n{line}\n"
    shop.build(text)
    shop.build(text, arguments={"AT": "/d"})
    assert shop.told.rebuilt == [line]
    shop.build(text.replace("--mount=type=cache,target=${AT} ", ""))
    assert shop.told.rebuilt == ["RUN true"]


def test_an_argument_is_a_change_from_its_first_use(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN echo a > /a\nARG WHO=me\nRUN echo $WHO > /b\n"
    first = shop.build(text)
    assert shop.read(first, "/b") == "me\n"
    second = shop.build(text, arguments={"WHO": "you"})
    assert shop.read(second, "/b") == "you\n"
    assert shop.told.reasons == {"RUN echo $WHO > /b": "the value of WHO has changed"}
    shop.build(text, arguments={"WHO": "me"})
    assert shop.told.rebuilt == []


def test_an_argument_behind_a_step_does_not_touch_it(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN echo a > /a\nARG WHO=me\n"
    shop.build(text)
    shop.build(text, arguments={"WHO": "you"})
    assert shop.told.rebuilt == []


def test_an_argument_that_a_copy_does_not_use_does_not_touch_it(shop: Workshop) -> None:
    shop.write({"f": "1"})
    text = "FROM scratch\nARG WHO=me\nCOPY f /f\n"
    shop.build(text)
    shop.build(text, arguments={"WHO": "you"})
    assert shop.told.rebuilt == []


def test_proxies_are_seen_and_are_no_change(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN echo $http_proxy $HTTPS_PROXY\n"
    proxies = {"http_proxy": "http://one", "HTTPS_PROXY": "http://two"}
    image = shop.build(text, arguments=proxies)
    assert shop.told.out() == "http://one http://two\n"
    assert b"http://one" not in image.config.raw
    shop.build(text, arguments={"http_proxy": "http://other"})
    assert shop.told.rebuilt == []


def test_a_proxy_that_is_declared_counts(shop: Workshop) -> None:
    text = f"FROM {BASE}\nARG http_proxy\nRUN echo $http_proxy\n"
    shop.build(text, arguments={"http_proxy": "http://one"})
    shop.build(text, arguments={"http_proxy": "http://other"})
    assert shop.told.reasons == {"RUN echo $http_proxy": "the value of http_proxy has changed"}


@pytest.mark.parametrize(
    "line", ["LABEL a=2", 'CMD ["x"]', "EXPOSE 80", "STOPSIGNAL 9", "VOLUME /v", 'ENTRYPOINT ["y"]']
)
def test_what_is_of_the_config_only_rebuilds_nothing(shop: Workshop, line: str) -> None:
    text = f"FROM {BASE}\nLABEL a=1\nRUN echo b > /b\n"
    first = shop.build(text)
    second = shop.build(text.replace("LABEL a=1", line))
    assert shop.told.rebuilt == []
    assert second.manifest.layers == first.manifest.layers
    assert second.image_id != first.image_id


def test_user_and_working_directory_are_changes(shop: Workshop) -> None:
    shop.build(f"FROM {BASE}\nRUN true\n")
    shop.build(f"FROM {BASE}\nUSER app\nRUN true\n")
    assert shop.told.reasons == {"RUN true": "its user has changed, it was not set"}
    shop.build(f"FROM {BASE}\nWORKDIR /tmp\nRUN true\n")
    shop.build(f"FROM {BASE}\nWORKDIR /srv\nRUN true\n")
    assert shop.told.reasons["RUN true"] == "it comes after a change: WORKDIR /srv"


def test_the_shell_is_a_change(shop: Workshop) -> None:
    shop.build(f"FROM {BASE}\nRUN echo b\n")
    shop.build(f'FROM {BASE}\nSHELL ["/bin/ash", "-c"]\nRUN echo b\n')
    assert shop.told.reasons == {
        "RUN echo b": "its command has changed, it was: /bin/sh -c 'echo b'"
    }


def test_the_network_is_a_change(shop: Workshop) -> None:
    shop.build(f"FROM {BASE}\nRUN true\n")
    shop.build(f"FROM {BASE}\nRUN true\n", network="host")
    assert shop.told.reasons == {"RUN true": "its network has changed, it was: none"}


def test_limits_are_no_change(shop: Workshop) -> None:
    shop.build(CHAIN)
    shop.build(CHAIN, limits=replace(shop.limits, processes=16, wall_time_s=30.0))
    assert shop.told.rebuilt == []


# The base


def test_another_base_of_the_same_name_rebuilds_all(shop: Workshop) -> None:
    shop.build(f"FROM {BASE}\nRUN touch /new\n", tag="base")
    shop.build("FROM base\nRUN echo b > /b\n", name="other")
    shop.build(f"FROM {BASE}\nRUN touch /newer\n", tag="base")
    shop.build("FROM base\nRUN echo b > /b\n", name="other")
    assert shop.told.reasons == {"RUN echo b > /b": "its base image has changed"}


def test_a_target_stops_at_its_stage_and_its_steps_stay_cached(shop: Workshop) -> None:
    text = f"FROM {BASE} AS one\nRUN echo a > /a\nFROM one AS two\nRUN echo b > /b\n"
    shop.build(text, target="one")
    assert shop.told.rebuilt == [A]
    shop.build(text)
    assert shop.told.rebuilt == [B]
    assert shop.told.reasons == {B: NEVER}


# Prune


def test_what_was_pruned_is_built_again_and_said_so(shop: Workshop) -> None:
    first = shop.build(CHAIN, tag="kept")
    shop.store.untag("kept")
    shop.store.prune(PruneOptions(build_cache=True))
    assert not shop.store.has_blob(first.manifest.layers[-1].digest)
    assert shop.build(CHAIN).digest == first.digest
    assert shop.told.rebuilt == [A, B, C, D]
    assert set(shop.told.reasons.values()) == {NEVER}


def test_a_record_that_was_taken_for_room_is_told(shop: Workshop) -> None:
    shop.build(CHAIN, tag="kept")
    before = {record.key for record in shop.store.records.all()}
    shop.build(CHAIN.replace("echo d", "echo D"))
    (newest,) = {record.key for record in shop.store.records.all()} - before
    shop.store.records.remove(newest)
    shop.build(CHAIN.replace("echo d", "echo D"))
    assert shop.told.reasons == {"RUN echo D > /d": "its record was pruned"}


def test_a_cache_whose_layer_is_lost_is_no_cache(shop: Workshop) -> None:
    first = shop.build(CHAIN)
    top = first.manifest.layers[-1].digest.partition(":")[2]
    (shop.store.folder / "blobs" / "sha256" / top).unlink()
    assert shop.build(CHAIN).digest == first.digest
    assert shop.told.reasons == {D: "its layer was pruned"}


def test_a_record_that_lies_or_is_torn_is_passed_over(shop: Workshop) -> None:
    first = shop.build(CHAIN)
    records = sorted((shop.store.folder / "cache").iterdir())
    for number, record in enumerate(records):
        record.write_text(("", "{", "[]", '{"digests": ["sha256:x"]}', "{}")[number % 5])
    assert shop.build(CHAIN).digest == first.digest
    assert shop.told.rebuilt == [A, B, C, D]


# Two at once

_ONE_BUILD = """
import sys
from pathlib import Path
from tests.integration.builds import Workshop
from sandbox_kernel.build.builder import build
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.image.store import Store
from tests.integration.builds import LIMITS, Told
root, told = Path(sys.argv[1]), Told()
with Store.open(root / "store") as store:
    print("up", flush=True)
    sys.stdin.readline()
    options = BuildOptions(root / "context", root / "Dockerfile", limits=LIMITS)
    print(build(store, options, told).digest)
"""


def test_two_processes_may_build_the_same_at_once(shop: Workshop) -> None:
    shop.write({"f": "1" * 100_000})
    text = CHAIN + "COPY f /f\nWORKDIR /new/folder\n"
    (shop.root / "Dockerfile").write_text(text)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", _ONE_BUILD, str(shop.root)],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for one in both:
        assert one.stdout is not None
        assert one.stdout.readline() == "up\n"
    said = []
    for one in both:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()
    for one in both:
        out, err = one.communicate(timeout=100)
        assert one.returncode == 0, err
        said.append(out.strip())
    assert said[0] == said[1]
    assert shop.build(text).digest == said[0]
    assert shop.told.rebuilt == []
    # Each process has a folder there while it lives, and this one lives.
    (own,) = (shop.store.folder / "staging").iterdir()
    assert os.listdir(own) == []


def test_records_name_no_value_of_the_environment_that_is_a_secret(shop: Workshop) -> None:
    """A record is what a user may show: it holds what the image's config shows too, not more."""
    shop.build(
        f"FROM {BASE}\nRUN echo $http_proxy > /dev/null\n",
        arguments={"http_proxy": "http://u:hush@p"},
    )
    found = [one.read_text() for one in (shop.store.folder / "cache").iterdir()]
    assert found
    assert all(json.loads(text) is not None and "hush" not in text for text in found)
