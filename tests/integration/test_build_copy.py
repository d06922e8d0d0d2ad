"""COPY and ADD on real folders and layers: what lands where, with which attributes."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import socket
import stat
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.build import instructions as ins
from sandbox_kernel.build.context import ContextTree, read_ignore
from sandbox_kernel.build.copy import Destination, Transfer, prepare
from sandbox_kernel.build.dockerfile import parse
from sandbox_kernel.build.ignore import Ignore
from sandbox_kernel.build.tree import LayerTree, Node
from sandbox_kernel.errors import BuildError
from sandbox_kernel.image.view import View

PASSWD = "root:x:0:0::/root:/bin/sh\napp:x:1234:1235::/home/app:/bin/sh\n"
GROUP = "root:x:0:\napp:x:1235:\nstaff:x:50:\n"
EPOCH_S = 1_700_000_000


def write(root: Path, files: dict[str, str]) -> Path:
    """Make files; a name with a slash at its end is a folder, `->` before content a link."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir(exist_ok=True)
        elif content.startswith("->"):
            path.symlink_to(content[2:])
        else:
            path.write_text(content)
            path.chmod(0o644)
    return root


class Bench:
    """A context, layers below, and what instructions make of them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.context = root / "context"
        self.context.mkdir()
        self.base = root / "base"
        self.base.mkdir(mode=0o755)
        write(self.base, {"etc/passwd": PASSWD, "etc/group": GROUP})
        self.lowers = (self.base,)
        self.working_dir = "/"
        self._count = 0

    def prepared(self, line: str, ignore: Ignore | None = None) -> Transfer:
        self._count += 1
        scratch = self.root / f"scratch-{self._count}"
        scratch.mkdir()
        (_, instruction) = parse("FROM a\n" + line).instructions
        assert isinstance(instruction, ins.Copy | ins.Add)
        source = LayerTree(View(list(self.lowers)), "the stage b")
        tree = source if getattr(instruction, "stage", "") else ContextTree(self.context, ignore)
        return prepare(instruction, tree, View(list(self.lowers)), scratch)

    def layer(self, line: str, ignore: Ignore | None = None) -> Path:
        folder = self.root / f"layer-{self._count + 1}"
        folder.mkdir()
        self.prepared(line, ignore).write(
            Destination(folder, self.lowers, self.working_dir, EPOCH_S)
        )
        return folder

    def names(self, line: str, ignore: Ignore | None = None) -> list[str]:
        return names_of(self.layer(line, ignore))

    def digest(self, line: str, ignore: Ignore | None = None) -> str:
        return self.prepared(line, ignore).content().digest


def names_of(folder: Path) -> list[str]:
    """Give all paths below a folder, folders with a slash and links with where they lead."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            name += f" -> {path.readlink()}"
        found.append(name + "/" if path.is_dir() and not path.is_symlink() else name)
    return found


def looks(layer: Path, path: str) -> tuple[int, int, int]:
    """Give permissions and owner, recorded or real."""
    node = LayerTree(View([layer]), "layer").find(path, follow=False)
    assert node is not None
    return node.mode & 0o7777, node.uid, node.gid


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


# Where things go


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("COPY a.txt /x", ["x"]),
        ("COPY a.txt /x/", ["x/", "x/a.txt"]),
        ("COPY a.txt /", ["a.txt"]),
        ("COPY a.txt .", ["w/", "w/a.txt"]),
        ("COPY a.txt y/z", ["w/", "w/y/", "w/y/z"]),
        ("COPY a.txt /etc", ["etc/", "etc/a.txt"]),
        ("COPY d /x", ["x/", "x/b.txt", "x/e/", "x/e/c.txt", "x/link -> b.txt"]),
        ("COPY d/ /x/", ["x/", "x/b.txt", "x/e/", "x/e/c.txt", "x/link -> b.txt"]),
        ("COPY d/. /x", ["x/", "x/b.txt", "x/e/", "x/e/c.txt", "x/link -> b.txt"]),
        ("COPY /d/e /x", ["x/", "x/c.txt"]),
        ("COPY ../../d/e /x", ["x/", "x/c.txt"]),
        ("COPY d/link /x/", ["x/", "x/link"]),
        ("COPY to-d /x", ["x/", "x/b.txt", "x/e/", "x/e/c.txt", "x/link -> b.txt"]),
        ("COPY a.txt d/b.txt /x/", ["x/", "x/a.txt", "x/b.txt"]),
        ("COPY *.txt /x/", ["x/", "x/a.txt"]),
        ("COPY ?.txt none* /x/", ["x/", "x/a.txt"]),
        ("COPY d/* /x/", ["x/", "x/b.txt", "x/c.txt", "x/link"]),
        ("COPY d*/[a-e] /x/", ["x/", "x/c.txt"]),
        ("COPY none* /x/", ["x/"]),
        ("COPY --exclude=*.txt d /x", ["x/", "x/e/", "x/e/c.txt", "x/link -> b.txt"]),
        ("COPY --exclude=**/*.txt --exclude=link d /x", ["x/", "x/e/"]),
        ("COPY --exclude=a* *.txt /x/", ["x/"]),
        ("COPY --parents d/e/c.txt a.txt /x/", ["x/", "x/a.txt", "x/d/", "x/d/e/", "x/d/e/c.txt"]),
        ("COPY --parents d/./e/c.txt /x/", ["x/", "x/e/", "x/e/c.txt"]),
        ("COPY --parents d/**/*.txt /x/", ["x/", "x/d/", "x/d/b.txt", "x/d/e/", "x/d/e/c.txt"]),
        ("COPY --parents d/e /x/", ["x/", "x/d/", "x/d/e/", "x/d/e/c.txt"]),
        ("COPY <<f <<g /x/\n1\nf\n2\ng", ["x/", "x/f", "x/g"]),
        ("COPY <<f /x\n1\nf", ["x"]),
        ("ADD a.txt d /x/", ["x/", "x/a.txt", "x/b.txt", "x/e/", "x/e/c.txt", "x/link -> b.txt"]),
    ],
)
def test_where_sources_land(bench: Bench, line: str, found: list[str]) -> None:
    write(
        bench.context,
        {"a.txt": "a", "d/b.txt": "b", "d/e/c.txt": "c", "d/link": "->b.txt", "to-d": "->d"},
    )
    bench.working_dir = "/w"
    assert bench.names(line) == found


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("COPY none /x", "none is not in the build context"),
        ("COPY --parents d/none /x", "d/none is not in the build context"),
        ("COPY out /x", "out is not in the build context"),
        ("COPY loop /x", "leads through too many links"),
        ("COPY a.txt b.txt /x", "several files cannot be copied to the one file /x"),
        ("COPY *.txt /x", "several files cannot be copied to the one file /x"),
        ("COPY d /etc/passwd", "a folder cannot be copied to /etc/passwd: a file is there"),
        ("COPY a.txt /etc/passwd/", "a folder cannot be copied to /etc/passwd: a file is there"),
        ("COPY a.txt /etc/passwd/x", "a folder cannot be copied to /etc/passwd: a file is there"),
        ("COPY clash /", "a file cannot be copied to /etc: a folder is there"),
        ("COPY --chmod=888 a.txt /x", "--chmod=888"),
        ("COPY --chmod=u+q a.txt /x", "--chmod=u+q"),
        ("COPY --chown=nobody a.txt /x", "--chown=nobody: there is no user 'nobody'"),
        ("COPY --chown=app:none a.txt /x", "there is no group 'none'"),
        ("COPY --chown=4294967295 a.txt /x", "out of range"),
        ("COPY https://example.com/x /x", "COPY of the URL"),
        ("COPY pipe /x", "pipe of the build context is a FIFO"),
        ("COPY <<a/b /x\n1\na/b", "a heredoc named a/b"),
        ("ADD --checksum=sha256:1 https://example.com/x /x", "--checksum=sha256:1"),
    ],
)
def test_what_cannot_be_copied_is_named(bench: Bench, line: str, says: str) -> None:
    write(
        bench.context,
        {"a.txt": "", "b.txt": "", "d/x": "", "out": "->/etc/passwd", "loop": "->loop"},
    )
    write(bench.context, {"clash/etc": "a file"})
    os.mkfifo(bench.context / "pipe")
    with pytest.raises(BuildError) as caught:
        bench.layer(line)
    assert says in caught.value.problem
    assert caught.value.hint
    assert caught.value.place == "Dockerfile:2"


def test_links_of_the_context_never_lead_out(bench: Bench, tmp_path: Path) -> None:
    write(tmp_path, {"secret": "s", "outside/secret": "s"})
    write(
        bench.context,
        {
            "up": "->../secret",
            "far": "->../../../../../../etc/hostname",
            "folder": f"->{tmp_path}/outside",
            "inside": "->/d/file",
            "d/file": "f",
            "d/back": "->../../context/d/file",
        },
    )
    for line in ("COPY up /x", "COPY far /x", "COPY folder/secret /x", "COPY folder /x"):
        with pytest.raises(BuildError, match="is not in the build context"):
            bench.layer(line)
    assert (bench.layer("COPY inside /x") / "x").read_text() == "f"
    # A link within what is copied is copied as a link, wherever it leads.
    assert bench.names("COPY --exclude=d --exclude=inside . /x") == [
        "x/",
        f"x/far -> {'../' * 6}etc/hostname",
        f"x/folder -> {tmp_path}/outside",
        "x/up -> ../secret",
    ]


def test_a_folder_that_became_a_link_is_not_followed(bench: Bench, tmp_path: Path) -> None:
    write(bench.context, {"d/file": "f"})
    write(tmp_path, {"outside/file": "secret"})
    tree = ContextTree(bench.context)
    node = tree.find("d/file")
    assert node is not None
    tree.find("")  # lets go of the folder
    (bench.context / "d").rename(bench.context / "e")
    (bench.context / "d").symlink_to(tmp_path / "outside")
    fresh = ContextTree(bench.context)
    with pytest.raises(BuildError, match="d/file of the build context cannot be read"):
        fresh.open(node)


def test_links_of_the_image_are_resolved_inside_of_it(bench: Bench) -> None:
    write(bench.context, {"a": "a", "d/b": "b"})
    write(
        bench.base,
        {"opt/real/": "", "link": "->opt/real", "abs": "->/opt/real", "up": "->../../../opt/new"},
    )
    assert bench.names("COPY a /link/") == ["opt/", "opt/real/", "opt/real/a"]
    assert bench.names("COPY a /abs") == ["opt/", "opt/real/", "opt/real/a"]
    assert bench.names("COPY d /up/x") == ["opt/", "opt/new/", "opt/new/x/", "opt/new/x/b"]
    assert bench.names("COPY --link d /link/x") == ["link/", "link/x/", "link/x/b"]


def test_a_file_replaces_a_link_and_not_what_it_leads_to(bench: Bench) -> None:
    write(bench.context, {"d/app": "new", "app": "new"})
    write(bench.base, {"bin/app": "->/etc/passwd"})
    assert bench.names("COPY d /bin") == ["bin/", "bin/app"]
    assert bench.names("COPY app /bin/") == ["bin/", "bin/app"]
    # The destination itself is followed.
    assert bench.names("COPY app /bin/app") == ["etc/", "etc/passwd"]


def test_a_folder_is_not_merged_into_a_link(bench: Bench) -> None:
    write(bench.context, {"d/lib/x": "x"})
    write(bench.base, {"usr/lib/": "", "lib": "->usr/lib"})
    with pytest.raises(BuildError, match="a folder cannot be copied to /lib: a link is there"):
        bench.layer("COPY d /")


def test_later_sources_win(bench: Bench) -> None:
    write(bench.context, {"a/f": "1", "b/f": "2", "c/f": "->x"})
    assert (bench.layer("COPY a b /x/") / "x/f").read_text() == "2"
    assert bench.names("COPY a c /x/") == ["x/", "x/f -> x"]


# Attributes


def test_owners_and_permissions(bench: Bench) -> None:
    write(bench.context, {"d/run": "x", "d/e/f": "y", "d/l": "->run"})
    (bench.context / "d/run").chmod(0o4755)
    (bench.context / "d/e").chmod(0o700)
    layer = bench.layer("COPY d /x/y")
    assert looks(layer, "x") == looks(layer, "x/y") == (0o755, 0, 0)
    assert looks(layer, "x/y/run") == (0o4755, 0, 0)
    assert looks(layer, "x/y/e") == (0o700, 0, 0)
    layer = bench.layer("COPY --chown=app:staff --chmod=640 d/e/f /x/")
    assert looks(layer, "x") == (0o755, 1234, 50)
    assert looks(layer, "x/f") == (0o640, 1234, 50)
    layer = bench.layer("COPY --chmod=u=rwX,go=rX,g+s d /x")
    assert looks(layer, "x/e") == (0o2755, 0, 0)
    assert looks(layer, "x/e/f") == (0o2644, 0, 0)


@pytest.mark.parametrize(
    ("owner", "ids"),
    [
        ("app", (1234, 1235)),
        ("app:50", (1234, 50)),
        ("7:staff", (7, 50)),
        ("7", (7, 7)),
        ("0:0", (0, 0)),
    ],
)
def test_owners_are_looked_up_in_the_image(bench: Bench, owner: str, ids: tuple[int, int]) -> None:
    write(bench.context, {"a": ""})
    assert looks(bench.layer(f"COPY --chown={owner} a /x"), "x")[1:] == ids


@pytest.mark.parametrize(
    ("chmod", "before", "after"),
    [
        ("u+x", 0o644, 0o744),
        ("+x", 0o644, 0o755),
        ("a-w,o=", 0o666, 0o440),
        ("g=u", 0o740, 0o770),
        ("u=rwX", 0o654, 0o754),
        ("go+X", 0o600, 0o600),
        ("u=rw,u+x", 0o000, 0o700),
        ("+t", 0o755, 0o1755),
        ("u-s", 0o4755, 0o755),
        ("7", 0o777, 0o007),
    ],
)
def test_permissions_change_as_chmod_does_it(
    bench: Bench, chmod: str, before: int, after: int
) -> None:
    write(bench.context, {"a": ""})
    (bench.context / "a").chmod(before | 0o400)
    node = bench.prepared("COPY a /x").sources[0].node
    transfer = bench.prepared(f"COPY --chmod={chmod} a /x")
    assert transfer.chmod is not None
    assert transfer.chmod(before, node.is_folder) == after


def test_tables_that_are_links_or_huge_are_no_way_out(bench: Bench) -> None:
    write(bench.context, {"a": ""})
    (bench.base / "etc/passwd").unlink()
    (bench.base / "etc/passwd").symlink_to("/proc/self/environ")
    with pytest.raises(BuildError, match="no user 'app'"):
        bench.layer("COPY --chown=app a /x")
    (bench.base / "etc/passwd").unlink()
    with (bench.base / "etc/passwd").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BuildError, match="more than"):
        bench.layer("COPY --chown=app a /x")


def test_folders_of_the_image_keep_their_attributes(bench: Bench) -> None:
    write(bench.context, {"d/tmp/a": "a"})
    (bench.base / "tmp").mkdir()
    (bench.base / "tmp").chmod(0o1777)
    os.utime(bench.base / "tmp", (5, 5))
    layer = bench.layer("COPY d /")
    assert looks(layer, "tmp") == (0o1777, 0, 0)
    assert (layer / "tmp").stat().st_mtime == 5
    # With --link nothing of the image is known.
    assert looks(bench.layer("COPY --link d/tmp /tmp"), "tmp") == (0o755, 0, 0)


def test_times_of_the_context_do_not_count(bench: Bench) -> None:
    write(bench.context, {"d/e/a": "a", "d/l": "->e"})
    os.utime(bench.context / "d/e/a", (5, 5))
    layer = bench.layer("COPY d /x")
    times = {path.lstat().st_mtime for path in layer.rglob("*")}
    assert times == {EPOCH_S}


def test_a_folder_that_forbids_to_write_is_filled_all_the_same(bench: Bench) -> None:
    write(bench.context, {"d/e/a": "a"})
    (bench.context / "d/e").chmod(0o555)
    layer = bench.layer("COPY d /x")
    assert looks(layer, "x/e") == (0o555, 0, 0)
    assert (layer / "x/e/a").read_text() == "a"


def test_copies_of_a_stage_keep_owner_time_and_hard_links(bench: Bench) -> None:
    write(bench.context, {"a": "a"})
    first = bench.layer("COPY --chown=7:8 a /d/one")
    os.link(first / "d/one", first / "d/two")
    os.utime(first / "d/one", (9, 9))
    bench.lowers = (bench.base, first)
    layer = bench.layer("COPY --from=b /d /x")
    assert names_of(layer) == ["x/", "x/one", "x/two"]
    assert looks(layer, "x/one") == (0o644, 7, 8)
    assert (layer / "x/one").stat().st_ino == (layer / "x/two").stat().st_ino
    assert (layer / "x/one").stat().st_mtime == 9
    assert looks(bench.layer("COPY --from=b --chown=1 /d/one /x"), "x") == (0o644, 1, 1)


def test_a_stage_is_seen_as_its_layers_merge(bench: Bench) -> None:
    top = bench.root / "top"
    write(top, {"d/new": "n"})
    write(bench.base, {"d/old": "o", "d/gone": "g", "e/hidden": "h"})
    os.mknod(top / "d/gone", stat.S_IFCHR, os.makedev(0, 0))
    bench.lowers = (bench.base, top)
    assert bench.names("COPY --from=b /d /x") == ["x/", "x/new", "x/old"]
    with pytest.raises(BuildError, match="none is not in the stage b"):
        bench.layer("COPY --from=b none /x")


# .dockerignore


def test_what_is_ignored_is_not_there(bench: Bench) -> None:
    write(
        bench.context,
        {
            "a": "",
            "b": "",
            "d/keep": "",
            "d/drop": "",
            "e/x": "",
            "to-a": "->a",
            ".dockerignore": "",
        },
    )
    ignore = Ignore(["*", "!b", "!d/keep", "!to-a"])
    assert bench.names("COPY . /x", ignore) == ["x/", "x/b", "x/d/", "x/d/keep", "x/to-a -> a"]
    assert bench.names("COPY d /x", ignore) == ["x/", "x/keep"]
    assert bench.names("COPY * /x/", Ignore(["to-a", ".d*", "d", "e"])) == ["x/", "x/a", "x/b"]
    for line in ("COPY a /x", "COPY to-a /x", "COPY d/drop /x", "COPY e /x", "COPY e/x /x"):
        with pytest.raises(BuildError, match="is not in the build context") as caught:
            bench.layer(line, ignore)
        assert ".dockerignore" in caught.value.hint


def test_the_ignore_file_of_a_dockerfile_comes_first(tmp_path: Path) -> None:
    assert not read_ignore(tmp_path)
    write(tmp_path, {".dockerignore": "a", "sub/My.dockerignore": "b"})
    assert read_ignore(tmp_path, "sub/My").ignores("b")
    assert read_ignore(tmp_path, "Dockerfile").ignores("a")
    with pytest.raises(BuildError, match=r"\.dockerignore:2"):
        read_ignore(write(tmp_path, {".dockerignore": "a\n["}))


def test_sockets_are_passed_over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    write(bench.context, {"a": ""})
    monkeypatch.chdir(bench.context)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert bench.names("COPY . /x") == ["x/", "x/a"]


def test_a_context_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"the build context .*/none cannot be read"):
        ContextTree(tmp_path / "none")


# The digest


def test_the_digest_is_of_content_and_not_of_times(bench: Bench) -> None:
    write(bench.context, {"d/a": "a", "d/b": "b"})
    before = bench.digest("COPY d /x")
    os.utime(bench.context / "d/a", (5, 5))
    (bench.context / "new").write_text("not copied")
    assert bench.digest("COPY d /x") == before
    changes = {
        "content": lambda: write(bench.context, {"d/a": "A"}),
        "permissions": lambda: (bench.context / "d/b").chmod(0o755),
        "a name": lambda: (bench.context / "d/b").rename(bench.context / "d/c"),
        "a new file": lambda: write(bench.context, {"d/e": ""}),
        "a new folder": lambda: (bench.context / "d/f").mkdir(),
        "a link": lambda: write(bench.context, {"d/l": "->a"}),
    }
    seen = {before}
    for what, change in changes.items():
        change()
        digest = bench.digest("COPY d /x")
        assert digest not in seen, what
        seen.add(digest)
    assert bench.digest("COPY --chown=1 d /x") not in seen
    assert bench.digest("COPY --chmod=777 d /x") not in seen


def test_the_digest_is_the_same_elsewhere(bench: Bench) -> None:
    write(bench.context, {"d/a": "a", "d/e/b": "b"})
    write(bench.context, {"copy/e/b": "b", "copy/a": "a"})
    assert bench.digest("COPY d /x") == bench.digest("COPY copy /x")
    # A file's name is where it goes; what it is copied as decides.
    assert bench.digest("COPY d/a /x/") != bench.digest("COPY d/e/b /x/")


def test_the_digest_knows_whether_an_archive_is_unpacked(bench: Bench) -> None:
    (bench.context / "x.tar").write_bytes(tar_of({"a": "a"}))
    lines = ("ADD x.tar /x", "ADD --unpack=false x.tar /x", "ADD --unpack x.tar /x")
    assert len({bench.digest(line) for line in lines}) == 3
    assert bench.digest("COPY x.tar /x") == bench.digest(lines[1])


def test_what_has_changed_can_be_told(bench: Bench) -> None:
    write(bench.context, {"d/a": "a", "d/b": "b"})
    before = bench.prepared("COPY d /x").content().files
    write(bench.context, {"d/b": "B"})
    after = bench.prepared("COPY d /x").content().files
    assert list(before) == ["d/a", "d/b"]
    assert [path for path in before if before[path] != after[path]] == ["d/b"]


# ADD


def tar_of(files: dict[str, str], compress: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compress}") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode, entry.uid, entry.mtime = len(content), 0o600, 77, 1000
            tar.addfile(entry, io.BytesIO(content.encode()))
    return buffer.getvalue()


@pytest.mark.parametrize("compress", ["", "gz", "bz2", "xz"])
def test_an_archive_is_unpacked(bench: Bench, compress: str) -> None:
    (bench.context / "some.data").write_bytes(tar_of({"d/a": "a"}, compress))
    layer = bench.layer("ADD some.data /x")
    assert names_of(layer) == ["x/", "x/d/", "x/d/a"]
    assert looks(layer, "x/d/a") == (0o600, 77, 0)
    assert looks(bench.layer("ADD --chown=5 some.data /x"), "x/d/a") == (0o600, 5, 5)
    assert bench.names("ADD --unpack=false some.data /x/") == ["x/", "x/some.data"]
    assert bench.names("COPY some.data /x/") == ["x/", "x/some.data"]


@pytest.mark.parametrize("data", [b"", b"no archive", gzip.compress(b"x" * 2000), b"\0" * 2048])
def test_what_is_no_archive_is_copied(bench: Bench, data: bytes) -> None:
    (bench.context / "x.tar.gz").write_bytes(data)
    assert (bench.layer("ADD x.tar.gz /") / "x.tar.gz").read_bytes() == data


@pytest.mark.parametrize(("name", "says"), [("../a", "climbs"), ("/a", "absolute")])
def test_an_archive_that_lies_is_refused(bench: Bench, name: str, says: str) -> None:
    (bench.context / "x.tar").write_bytes(tar_of({name: "x"}))
    with pytest.raises(BuildError, match=says) as caught:
        bench.layer("ADD x.tar /x")
    assert caught.value.place == "Dockerfile:2"


def test_an_archive_does_not_write_through_links_of_the_image(bench: Bench) -> None:
    (bench.context / "x.tar").write_bytes(tar_of({"link/a": "x"}))
    write(bench.base, {"link": "->/etc"})
    with pytest.raises(BuildError, match="a link is there"):
        bench.layer("ADD x.tar /")


class Site(http.server.BaseHTTPRequestHandler):
    """Serves a file, redirects to it and elsewhere."""

    DATA = b"some data"

    def do_GET(self) -> None:
        moved = {"/moved": "/file.bin?x=1", "/loop": "/loop", "/away": "http://169.254.169.254/"}
        if self.path in moved:
            self.send_response(302)
            self.send_header("Location", moved[self.path])
        elif self.path.startswith("/file.bin"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.DATA)))
        else:
            self.send_response(404)
        self.end_headers()
        if self.path.startswith("/file.bin"):
            self.wfile.write(self.DATA)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def site() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_url_is_fetched(bench: Bench, site: str) -> None:
    layer = bench.layer(f"ADD {site}/file.bin /x/")
    assert (layer / "x/file.bin").read_bytes() == Site.DATA
    assert looks(layer, "x/file.bin") == (0o600, 0, 0)
    assert (layer / "x/file.bin").stat().st_mtime == EPOCH_S
    assert bench.names(f"ADD {site}/moved /x/") == ["x/", "x/moved"]
    assert bench.names(f"ADD --chmod=755 {site}/file.bin /x") == ["x"]


def test_a_checksum_is_held_to(bench: Bench, site: str) -> None:
    good = "sha256:" + hashlib.sha256(Site.DATA).hexdigest()
    line = f"ADD --checksum={good} {site}/file.bin /x"
    transfer = bench.prepared(line)
    assert transfer.content().files == {f"{site}/file.bin": good}
    assert not list(transfer.scratch.iterdir()), "it was fetched for its digest"
    assert bench.names(line) == ["x"]
    bad = "sha256:" + "0" * 64
    with pytest.raises(BuildError, match=f"is {good}, not {bad}"):
        bench.layer(f"ADD --checksum={bad} {site}/file.bin /x")


@pytest.mark.parametrize(
    ("path", "says"),
    [("/none", "404"), ("/loop", "redirects too often"), ("/away", "which is not allowed")],
)
def test_what_cannot_be_fetched_is_named(bench: Bench, site: str, path: str, says: str) -> None:
    with pytest.raises(BuildError, match=says) as caught:
        bench.layer(f"ADD {site}{path} /x")
    assert caught.value.hint


def test_a_server_that_is_not_there_is_named(bench: Bench) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(BuildError, match="cannot be fetched"):
            bench.layer(f"ADD http://127.0.0.1:{port}/x /x")


def test_a_node_knows_what_it_is() -> None:
    assert Node("a/b", stat.S_IFREG | 0o644).name == "b"
