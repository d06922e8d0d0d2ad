"""RUN for real: its forms, its user, its mounts, its limits, and what its layer holds."""

from __future__ import annotations

import fcntl
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox_kernel.build.builder import build
from sandbox_kernel.build.events import StepOutput
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.prune import PruneOptions
from tests.integration import leaks
from tests.integration.builds import BASE, Workshop, needs_busybox

pytestmark = [pytest.mark.needs("memory", "processes"), needs_busybox]
as_root = pytest.mark.skipif(
    os.geteuid() != 0, reason="only root stores owners on disk as they are"
)

SECRET = "hush-4f1c9a"


# Forms


@pytest.mark.parametrize(
    ("line", "out"),
    [
        ("RUN echo $0 $((1 + 2))", "/bin/sh 3\n"),
        ("RUN echo one \\\n  two", "one two\n"),
        ('RUN ["echo", "$HOME", "a b"]', "$HOME a b\n"),
        ('RUN ["sh", "-c", "echo $HOME"]', "/root\n"),
        ("RUN <<EOF\necho one\necho two\nEOF", "one\ntwo\n"),
        ("RUN <<EOF\n#!/bin/awk -f\nBEGIN { print 6 * 7 }\nEOF", "42\n"),
        ("RUN cat <<EOF\nA $HOME\nEOF", "A /root\n"),
        ("RUN cat <<'EOF'\nA $HOME\nEOF", "A $HOME\n"),
        ("RUN cat <<-EOF\n\t\tA\n\tEOF", "A\n"),
        ("RUN cat - /dev/fd/3 <<ONE 3<<TWO\n1\nONE\n2\nTWO", "1\n2\n"),
        ('SHELL ["/bin/ash", "-ec"]\nRUN false; echo not reached || true', None),
        ('SHELL ["/bin/echo", "words:"]\nRUN a "b"', 'words: a "b"\n'),
        ('SHELL ["/bin/sh", "-c"]\nRUN <<EOF\nread x </dev/null || echo none\nEOF', "none\n"),
    ],
)
def test_forms(shop: Workshop, line: str, out: str | None) -> None:
    if out is None:
        with pytest.raises(BuildError, match="exit code: 1"):
            shop.run(line)
        return
    assert shop.run(line) == out


def test_streams_come_while_it_runs_and_are_told_apart(shop: Workshop) -> None:
    said: list[tuple[str, bytes]] = []

    # The step waits for a file in its cache folder, which is made when its first line is here.
    def tell(event: object) -> None:
        if isinstance(event, StepOutput):
            said.append((event.stream, event.data))
            for mount in shop.store.cache_mounts.all():
                (mount.path / "heard").touch()

    path = shop.root / "Dockerfile"
    path.write_text(
        f"FROM {BASE}\nRUN --mount=type=cache,target=/c echo first; until test -e /c/heard; do :; done;"
        " echo second >&2\n"
    )
    build(shop.store, BuildOptions(shop.context, path, limits=shop.limits), tell)
    assert said == [("stdout", b"first\n"), ("stderr", b"second\n")]


# User, folder, environment


@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("app", "1234 1235 1235 50 /home/app"),
        ("1234", "1234 1235 1235 50 /home/app"),
        ("app:staff", "1234 50 50 /home/app"),
        ("app:7", "1234 7 7 /home/app"),
        ("4000:4001", "4000 4001 4001 /"),
        ("nobody", "65534 65534 65534 /"),
        ("root", "0 0 0 /root"),
    ],
)
def test_user(shop: Workshop, user: str, ids: str) -> None:
    said = shop.run(f"USER {user}\nRUN echo $(id -u) $(id -g) $(id -G) $HOME")
    assert said.split() == ids.split()


@pytest.mark.parametrize(
    ("user", "says"),
    [
        ("nosuch", "there is no user 'nosuch' in the image's /etc/passwd"),
        ("app:nosuch", "there is no group 'nosuch' in the image's /etc/group"),
        ("4294967296", "user 4294967296 of '4294967296' is out of range"),
        ("70000", "user 70000"),
    ],
)
def test_a_user_that_cannot_be_is_named(shop: Workshop, user: str, says: str) -> None:
    with pytest.raises(BuildError) as raised:
        shop.build(f"FROM {BASE}\nUSER {user}\nRUN true\n")
    assert says in raised.value.message
    assert "Dockerfile:3" in raised.value.message


@as_root
def test_a_working_directory_is_made_for_its_user(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE}\nWORKDIR /one\nUSER app\nWORKDIR two\nRUN pwd; touch mine; stat -c %u:%g .\n"
    )
    assert shop.told.out() == "/one/two\n1234:1235\n"
    assert image.config.working_dir == "/one/two"
    view = shop.view(image)
    found = {path: view.find(path) for path in ("/one", "/one/two", "/one/two/mine")}
    owners = {path: (one.info.st_uid, one.info.st_gid) for path, one in found.items() if one}
    assert owners == {"/one": (0, 0), "/one/two": (1234, 1235), "/one/two/mine": (1234, 1235)}


def test_a_working_directory_that_is_there_stays_as_it_is(shop: Workshop) -> None:
    image = shop.build(f"FROM {BASE}\nUSER app\nWORKDIR /tmp\n")
    assert len(image.manifest.layers) == 1
    entry = shop.view(image).find("/tmp")
    assert entry is not None
    assert stat.S_IMODE(entry.info.st_mode) == 0o1777


def test_the_environment_is_env_and_args_and_nothing_of_ours(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OF_THE_CALLER", "1")
    said = shop.run("ARG GIVEN=1\nENV SET=2 PATH=/bin\nRUN env", arguments={"GIVEN": "3"})
    found = dict(line.split("=", 1) for line in said.splitlines())
    assert found.pop("PWD") == "/"
    assert found.pop("SHLVL") == "1"
    assert found == {
        "GIVEN": "3",
        "SET": "2",
        "PATH": "/bin",
        "HOME": "/root",
        "SOURCE_DATE_EPOCH": "0",
    }


# What a layer holds


def test_mount_points_and_names_leave_no_trace(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE}\nRUN --mount=type=tmpfs,target=/t --mount=type=cache,target=/v/c"
        " --mount=type=bind,target=/src --mount=type=secret,id=none,target=/run/secrets/none"
        " touch /made\n"
    )
    assert set(shop.layer(image)) == {"made"}


def test_a_mount_on_a_folder_of_the_image_leaves_it_alone(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE}\nRUN echo kept > /srv/kept\n"
        "RUN --mount=type=cache,target=/srv echo cached > /srv/cached; ls /srv; touch /made\n"
    )
    assert shop.told.out() == "cached\n"
    assert set(shop.layer(image)) == {"made"}
    assert shop.read(image, "/srv/kept") == "kept\n"


def test_what_is_written_beside_a_mount_point_is_kept(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE}\nRUN --mount=type=cache,target=/new/c touch /new/beside /new/c/inside\n"
    )
    assert set(shop.layer(image)) == {"new", "new/beside"}


def test_links_modes_and_attributes_come_out_right_in_the_next_stage(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE} AS one\n"
        "RUN mkdir /d && echo x > /d/a && ln /d/a /d/b && ln -s a /d/l && mkfifo /d/p"
        " && cp /bin/busybox /d/su && chmod 4755 /d/su && mkdir -m 1777 /d/t && chmod 640 /d/a\n"
        "FROM one\n"
        "RUN cd /d; stat -c '%n %a %h' a b su t; readlink l; test -p p && echo pipe;"
        " test a -ef b && echo same; chmod 600 l\n"
    )
    assert shop.told.out().splitlines() == [
        "a 640 2", "b 640 2", "su 4755 1", "t 1777 2", "a", "pipe", "same",
    ]  # fmt: skip
    first = shop.layer(image, 1)
    assert (first["d/b"].islnk(), first["d/b"].linkname) == (True, "d/a")
    assert first["d/su"].mode == 0o4755
    # Overlayfs copies up one name of several (index=off), as Docker's does.
    assert set(shop.layer(image)) == {"d", "d/a"}


@as_root
def test_owners_come_out_right_in_the_next_stage(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE} AS one\nRUN mkdir /d && touch /d/f && chown app:staff /d/f && chown 65535:0 /d\n"
        "FROM one\nRUN stat -c '%n %u:%g' /d /d/f\n"
    )
    assert shop.told.out() == "/d 65535:0\n/d/f 1234:50\n"
    assert (shop.layer(image)["d/f"].uid, shop.layer(image)["d/f"].gid) == (1234, 50)


def test_what_is_removed_is_gone_and_what_is_made_again_is_new(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE}\nRUN mkdir -p /d/sub /e && touch /d/old /d/sub/old /e/gone\n"
        "RUN rm -rf /d && mkdir /d && touch /d/new && rm /e/gone\n"
        "RUN ls -R /d /e; mkdir /d/sub; ls /d/sub\n"
    )
    assert shop.told.out() == "/d:\nnew\n\n/e:\n"
    second = shop.layer(image, 2)
    assert {"d", "d/.wh..wh..opq", "d/new", "e", "e/.wh.gone"} == set(second)
    assert shop.view(image).find("/d/old") is None


def test_a_file_that_was_made_and_removed_leaves_no_trace(shop: Workshop) -> None:
    image = shop.build(f"FROM {BASE}\nRUN touch /srv/x && rm /srv/x; mkdir /y && rmdir /y\n")
    names = set(shop.layer(image)) if len(image.manifest.layers) > 1 else set()
    assert names <= {"srv"}


def test_times_are_the_epochs_and_no_later(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN touch /now; touch -d @1000 /then\n"
    image = shop.build(text, epoch_s=2000)
    layer = shop.layer(image)
    assert (layer["now"].mtime, layer["then"].mtime) == (2000, 1000)
    assert image.config.created == "1970-01-01T00:33:20Z"


# Mounts


def test_a_cache_is_kept_between_builds_and_not_in_the_image(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN --mount=type=cache,target=/c cat /c/n; echo VALUE > /c/n\n"
    shop.build(text)
    assert shop.told.out() == ""
    image = shop.build(text.replace("VALUE", "2"))
    assert shop.told.out() == "VALUE\n"
    assert len(image.manifest.layers) == 1
    shop.build(text.replace("/c ", "/c,id=other ").replace("VALUE", "3"))
    assert shop.told.out() == ""


@pytest.mark.parametrize("sharing", ["shared", "locked", "private"])
def test_the_ways_to_share_a_cache(shop: Workshop, sharing: str) -> None:
    text = f"FROM {BASE}\nRUN --mount=type=cache,target=/c,sharing={sharing} cat /c/n; echo VALUE > /c/n\n"
    shop.build(text)
    shop.build(text.replace("VALUE", "2"))
    assert shop.told.out() == "VALUE\n"


def test_a_private_cache_that_is_taken_gives_another_one(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN --mount=type=cache,target=/c,sharing=private cat /c/n; echo VALUE > /c/n\n"
    shop.build(text)
    (lock,) = (shop.store.folder / "cache-mounts").glob("*.lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        shop.build(text.replace("VALUE", "2"))
    assert shop.told.out() == ""


def test_a_prune_of_the_build_cache_takes_caches_that_no_step_has(shop: Workshop) -> None:
    line = "RUN --mount=type=cache,target=/c,id={} echo 12345 > /c/n\n"
    shop.build(f"FROM {BASE}\n{line.format('a')}{line.format('b')}")
    usage = shop.store.disk_usage()
    assert (usage.cache_mounts, usage.mounts_bytes) == (2, 12)
    in_use = next((shop.store.folder / "cache-mounts").glob("*.lock"))
    with in_use.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        assert shop.store.prune(PruneOptions()).cache_mounts == 0
        kept = shop.store.prune(PruneOptions(build_cache=True, keep_bytes=1 << 30))
        recent = shop.store.prune(PruneOptions(build_cache=True, older_than_s=3600))
        assert kept.cache_mounts == recent.cache_mounts == 0
        assert shop.store.prune(PruneOptions(build_cache=True)).cache_mounts == 1
    assert [one.path.name for one in shop.store.cache_mounts.all()] == [in_use.stem]
    assert shop.store.prune(PruneOptions(build_cache=True, keep_bytes=0)).size_bytes == 6
    assert shop.store.disk_usage().cache_mounts == 0


@as_root
def test_a_cache_has_the_owner_that_is_asked_for(shop: Workshop) -> None:
    said = shop.run(
        "USER app\nRUN --mount=type=cache,target=/c,uid=1234,gid=1235,mode=0700 stat -c '%u:%g %a' /c; touch /c/x"
    )
    assert said == "1234:1235 700\n"


def test_a_bind_shows_the_context_and_what_is_written_is_thrown_away(shop: Workshop) -> None:
    shop.write({"in/f": "of the context\n", "other": "x", ".dockerignore": "other\n"})
    image = shop.build(
        f"FROM {BASE}\n"
        "RUN --mount=type=bind,target=/src ls -A /src; cat /src/in/f; touch /src/in/x || echo refused\n"
        "RUN --mount=type=bind,source=in,target=/src,rw cat /src/f; echo y > /src/f; echo z > /src/z; cat /src/f\n"
    )
    assert shop.told.out() == ".dockerignore\nin\nof the context\nrefused\nof the context\ny\n"
    assert len(image.manifest.layers) == 1
    assert (shop.context / "in/f").read_text() == "of the context\n"
    assert not (shop.context / "in/z").exists()


def test_a_bind_may_be_one_file(shop: Workshop) -> None:
    shop.write({"tool.sh": "echo works\n"})
    said = shop.run("RUN --mount=type=bind,source=tool.sh,target=/opt/t.sh sh /opt/t.sh; ls /opt")
    assert said == "works\nt.sh\n"


def test_a_bind_shows_a_stage(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE} AS one\nRUN mkdir /out && echo made > /out/f && ln -s f /out/l\n"
        f"FROM {BASE}\nRUN --mount=type=bind,from=one,source=/out,target=/in cat /in/f /in/l; cp /in/f /kept\n"
    )
    assert shop.told.out() == "made\nmade\n"
    assert set(shop.layer(image)) == {"kept"}


def test_a_bind_is_a_miss_if_its_content_changed(shop: Workshop) -> None:
    shop.write({"in/f": "1", "in/g": "1"})
    text = f"FROM {BASE}\nRUN --mount=type=bind,source=in,target=/src cat /src/f\n"
    shop.build(text)
    os.utime(shop.context / "in/f", (5, 5))
    shop.build(text)
    assert shop.told.rebuilt == []
    shop.write({"in/g": "2"})
    shop.build(text)
    assert list(shop.told.reasons.values()) == ["in/g changed"]


def test_a_tmpfs_has_its_size_and_leaves_nothing(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE}\nRUN --mount=type=tmpfs,target=/t,size=1M"
        " df -k /t | tail -1 | awk '{print $1, $2}'; head -c 2m /dev/zero > /t/x || echo full\n"
    )
    assert shop.told.out() == "tmpfs 1024\nfull\n"
    assert len(image.manifest.layers) == 1


def secret(shop: Workshop) -> dict[str, Path]:
    path = shop.root / "secret"
    path.write_text(SECRET)
    return {"key": path}


def test_a_secret_is_seen_by_its_step_and_is_nowhere_in_the_store(shop: Workshop) -> None:
    text = (
        f"FROM {BASE}\n"
        "RUN --mount=type=secret,id=key cat /run/secrets/key | wc -c; touch /made\n"
        "RUN --mount=type=secret,id=key,target=/k,mode=0444 stat -c %a /k\n"
        "RUN --mount=type=secret,id=key,env=KEY echo ${#KEY}; test ! -e /run/secrets/key\n"
        "RUN ! test -e /run/secrets/key && echo ${KEY-unset}\n"
    )
    image = shop.build(text, secrets=secret(shop))
    assert shop.told.out() == f"{len(SECRET)}\n444\n{len(SECRET)}\nunset\n"
    for folder, _, names in os.walk(shop.store.folder):
        for name in names:
            path = Path(folder, name)
            assert SECRET.encode() not in path.read_bytes() if path.is_file() else True
    for number in range(len(image.manifest.layers)):
        assert not [name for name in shop.layer(image, number) if "secret" in name]
    assert SECRET not in repr(shop.told.events)


def test_another_secret_is_no_change(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN --mount=type=secret,id=key cat /run/secrets/key > /dev/null\n"
    shop.build(text, secrets=secret(shop))
    (shop.root / "secret").write_text("other")
    shop.build(text, secrets={"key": shop.root / "secret"})
    assert shop.told.rebuilt == []


def test_a_required_secret_that_is_missing_is_an_error(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="the secret key is required") as raised:
        shop.run("RUN --mount=type=secret,id=key,required true")
    assert raised.value.hint == "build --secret id=key,src=FILE"
    assert (
        shop.run("RUN --mount=type=secret,id=key test -e /run/secrets/key || echo none") == "none\n"
    )


def test_a_secret_file_that_cannot_be_read_is_named(shop: Workshop) -> None:
    with pytest.raises(BuildError, match=r"the secret key cannot be read: No such file"):
        shop.run("RUN --mount=type=secret,id=key true", secrets={"key": shop.root / "nowhere"})


def test_a_bind_of_what_is_not_there_is_named(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="nowhere"):
        shop.run("RUN --mount=type=bind,source=nowhere,target=/x true")


# Network


def test_a_step_has_no_network_unless_the_build_has(shop: Workshop) -> None:
    ours = os.readlink("/proc/self/ns/net")
    for build_has, step_asks, is_host in (
        ("none", "", False),
        ("none", "--network=none", False),
        ("none", "--network=default", False),
        ("host", "", True),
        ("host", "--network=none", False),
        ("host", "--network=host", True),
    ):
        line = f"RUN {step_asks} readlink /proc/self/ns/net"
        said = shop.run(line, network=build_has, use_cache=False)
        assert (said.strip() == ours) is is_host, line


def test_a_step_cannot_ask_for_more_network_than_the_build_has(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="RUN --network=host in a build without network") as raised:
        shop.run("RUN --network=host true")
    assert raised.value.hint == "allow it: build --network host"


def test_a_step_that_misses_the_network_is_told_so(shop: Workshop) -> None:
    with pytest.raises(BuildError) as raised:
        shop.run("RUN wget -q http://example.org/")
    assert raised.value.hint == "this step had no network: build --network host gives it one"


# Limits


def test_the_memory_limit_is_named(shop: Workshop) -> None:
    with pytest.raises(BuildError, match=r"needed more than the 16 MiB of memory") as raised:
        shop.run(
            "RUN x=$(head -c 100m /dev/zero | tr '\\0' x); echo survived",
            limits=replace(shop.limits, memory_bytes=16 << 20, disk_bytes=8 << 20),
        )
    assert "--memory" in raised.value.hint


def test_the_time_limit_is_named(shop: Workshop) -> None:
    with pytest.raises(BuildError, match=r"took longer than 500 ms") as raised:
        shop.run("RUN sleep 600", limits=replace(shop.limits, wall_time_s=0.5))
    assert "--wall-time" in raised.value.hint


def test_the_disk_limit_is_named(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="exit code") as raised:
        shop.run(
            "RUN dd if=/dev/zero of=/big bs=1M count=20",
            limits=replace(shop.limits, disk_bytes=8 << 20),
        )
    assert raised.value.hint == "a step may write 8 MiB: build --disk SIZE"


def test_the_limit_of_processes_is_named(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="exit code") as raised:
        shop.run(
            "RUN for n in $(seq 60); do sleep 600 & done", limits=replace(shop.limits, processes=16)
        )
    assert raised.value.hint == "a step may have 16 processes: build --processes NUMBER"


# Errors


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("RUN exit 7", "exit code: 7"),
        ("RUN kill -9 $$", "signal 9"),
        ('RUN ["/nowhere"]', "exec '/nowhere': No such file or directory"),
        ('SHELL ["/nowhere", "-c"]\nRUN x', "exec '/nowhere': No such file or directory"),
    ],
)
def test_a_failure_names_its_line_and_its_end(shop: Workshop, line: str, says: str) -> None:
    with pytest.raises(BuildError) as raised:
        shop.build(f"FROM {BASE}\n{line}\n")
    assert says in raised.value.message
    assert f"Dockerfile:{line.count(chr(10)) + 2}: " in raised.value.message


def test_an_image_without_a_shell_says_so(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="exec '/bin/sh': No such file or directory"):
        shop.build("FROM scratch\nRUN true\n")


# Attacks


@pytest.mark.escape
@pytest.mark.parametrize(
    "command",
    [
        "mount -t tmpfs none /srv",
        "mount -o bind /bin /srv",
        "umount /proc",
        "mknod /disk b 8 0",
        "mknod /null c 1 3",
        "echo 1 > /proc/sys/kernel/panic",
        "echo c > /proc/sysrq-trigger",
        "echo 1 > /proc/sys/vm/drop_caches",
        "unshare -U true",
        "unshare -m true",
        "chroot / mount -t proc none /srv",
        "hostname other",
        "sysctl -w kernel.hostname=other",
        "ls /sys/fs/cgroup/*/ | grep .",
        "cat /proc/kcore > /dev/null",
        "swapoff -a; swapon /bin/busybox",
        "ip link add dummy0 type dummy",
        "date -s 2000-01-01; test $(date +%Y) = 2000",
        "nsenter -t 1 -m true",
        "echo -1000 > /proc/self/oom_score_adj",
    ],
)
def test_root_of_a_step_is_refused(shop: Workshop, command: str) -> None:
    said = shop.run(f"RUN ({command}) > /dev/null 2>&1; echo $?")
    assert said.strip() not in ("0", "")


@pytest.mark.escape
def test_the_first_process_of_the_container_is_out_of_reach(shop: Workshop) -> None:
    assert shop.run("RUN kill -9 1; test -e /proc/1 || echo survived") == "survived\n"


@pytest.mark.escape
def test_what_a_step_leaves_running_ends_with_it(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE}\nRUN (trap '' TERM HUP; setsid sleep 4711 &) ; (while :; do date > /tick; done) & touch /made\n"
    )
    assert "made" in shop.layer(image)
    assert leaks.with_argument("4711") == []


@pytest.mark.escape
def test_a_fork_bomb_ends_with_its_step(shop: Workshop) -> None:
    with pytest.raises(BuildError, match=r"took longer than|exit code"):
        shop.run("RUN f() { f | f & f; }; f", limits=replace(shop.limits, wall_time_s=3.0))


@pytest.mark.escape
def test_a_layer_with_a_name_that_no_layer_may_have_is_refused(shop: Workshop) -> None:
    with pytest.raises(
        BuildError, match=r"a layer cannot hold names that begin with \.wh\."
    ) as raised:
        shop.build(f"FROM {BASE}\nRUN touch /srv/.wh.etc\n")
    assert "Dockerfile:2" in raised.value.message
    assert len(shop.store.images()) == 1


@pytest.mark.escape
def test_the_store_is_out_of_reach(shop: Workshop) -> None:
    folder = shop.store.folder
    said = shop.run(
        f"RUN --mount=type=cache,target=/c ls -d {folder} /c/../{folder} /c/../../{folder} /proc/1/root/{folder}"
        " 2>/dev/null; mount | grep -c sandbox-kernel || true"
    )
    assert str(folder) not in said


@pytest.mark.escape
def test_a_link_at_a_mount_point_leads_nowhere_else(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE}\nRUN ln -s /etc /link\n"
        "RUN --mount=type=tmpfs,target=/link/sub --mount=type=cache,target=/link/two ls -d /etc/sub /etc/two\n"
    )
    assert shop.told.out() == "/etc/sub\n/etc/two\n"
    assert not os.path.exists("/etc/sub")
    assert len(image.manifest.layers) == 2


@pytest.mark.escape
def test_a_layer_that_cannot_be_unpacked_is_the_fault_of_its_step(shop: Workshop) -> None:
    text = f"FROM {BASE}\nRUN ln -s ../../../etc /up\nRUN true\n"
    for _ in range(2):  # and it is not in the cache
        with pytest.raises(BuildError, match=r"Dockerfile:2: .*leads out of the image"):
            shop.build(text)
