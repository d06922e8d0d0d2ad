"""`sandbox-kernel image`: what it prints, as text and as JSON, and what it refuses."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel import __main__ as entry
from sandbox_kernel.build.events import StepBegun, StepEnded, StepMissed, StepOutput, Warned
from sandbox_kernel.build.run import JobLimits
from sandbox_kernel.cli import image as group
from sandbox_kernel.cli.image_bars import BarScreen
from sandbox_kernel.cli.image_build_steps import Steps
from sandbox_kernel.cli.image_limits import LIMITS, limits_of
from sandbox_kernel.cli.image_screen import PlainScreen
from sandbox_kernel.cli.image_text import MAX_LINE, Lines, harmless, one_line
from sandbox_kernel.image.documents import digest_of
from sandbox_kernel.image.store import Store
from tests.fakes.images import FakeImage, image_of, tar_of
from tests.fakes.registry import FakeImage as RemoteImage
from tests.fakes.registry import FakeRegistry, layer

ROOT = Path(__file__).parents[2]
SHELL = {"bin/sh": b"#!" * 600}
IMAGE_KEYS = {
    "version",
    "reference",
    "id",
    "digest",
    "platform",
    "created",
    "size_bytes",
    "layers",
}


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The store that the commands use."""
    monkeypatch.setenv("SANDBOX_KERNEL_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("DOCKER_CONFIG", "REGISTRY_AUTH_FILE", "SOURCE_DATE_EPOCH"):
        monkeypatch.delenv(name, raising=False)
    with Store.open() as opened:
        yield opened


@pytest.fixture
def base(store: Store) -> FakeImage:
    """An image of two layers with two names, and one on top of its first layer without a name."""
    found = image_of([SHELL, {"etc/x": b"x"}])
    found.put(store, "base:1")
    store.tag("base:1", "base:2")
    image_of([SHELL]).put(store, None)
    store.close()
    return found


class Cli:
    """Runs commands and holds what they printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.err = ""

    def __call__(self, *arguments: object, status: int = 0) -> str:
        found = entry.main(["image", *map(str, arguments)])
        captured = self._capsys.readouterr()
        self.err = captured.err
        assert found == status, captured.err
        return captured.out

    def json(self, *arguments: object) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self(*arguments, "--json"))
        assert content["version"] == 1
        return content

    def refused(self, *arguments: object, status: int = 1) -> str:
        assert self(*arguments, status=status) == ""
        assert "Traceback" not in self.err
        return self.err


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(capsys)


def shown_id(image: FakeImage) -> str:
    return image.config.image_id[7:19]


def give_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


# What is there


def test_an_empty_store_has_a_heading_only(cli: Cli) -> None:
    assert cli("list") == "REPOSITORY   TAG   IMAGE ID   CREATED   SIZE\n"
    assert cli.json("list") == {"version": 1, "images": []}


def test_list(cli: Cli, base: FakeImage) -> None:
    other = shown_id(image_of([SHELL]))
    sizes = re.findall(r"\d+ B|[\d.]+ KiB", cli("list"))
    assert cli("list").splitlines() == [
        "REPOSITORY   TAG      IMAGE ID       CREATED      SIZE",
        f"base         1        {shown_id(base)}   1970-01-01   {sizes[0]}",
        f"base         2        {shown_id(base)}   1970-01-01   {sizes[0]}",
        f"<none>       <none>   {other}   1970-01-01   {sizes[2]}",
    ]
    assert cli("ls") == cli("list")
    assert cli("list", "-q") == f"{shown_id(base)}\n{other}\n"
    assert cli("list", "base:2", "-q", "--no-trunc") == f"{base.config.image_id}\n"
    assert len(cli("list", "base").splitlines()) == 3
    assert len(cli("list", "elsewhere").splitlines()) == 1


def test_list_as_json(cli: Cli, base: FakeImage) -> None:
    images = cli.json("list")["images"]
    assert [one["reference"] for one in images] == [
        "docker.io/library/base:1",
        "docker.io/library/base:2",
        None,
    ]
    assert set(images[0]) == IMAGE_KEYS - {"version"}
    assert images[0]["id"] == base.config.image_id
    assert images[0]["digest"] == base.manifest.digest
    assert images[0]["layers"] == [one.digest for one in base.manifest.layers]


def test_inspect(cli: Cli, base: FakeImage) -> None:
    lines = cli("inspect", "base:1").splitlines()
    assert lines[:3] == [
        "Name:        base:1",
        f"ID:          {base.config.image_id}",
        f"Digest:      {base.manifest.digest}",
    ]
    assert "Cmd:         '/bin/sh'" in lines
    assert "Env:         PATH=/bin" in lines
    first, second = base.manifest.layers
    assert lines[-2:] == [
        f"Layers:      {first.digest} {first.size_bytes}",
        f"             {second.digest} {second.size_bytes}",
    ]
    content = cli.json("inspect", "base:1", "base:2")["images"]
    assert len(content) == 2
    assert content[0]["env"] == {"PATH": "/bin"}
    assert content[0]["layers"][0]["diff_id"] == base.config.diff_ids[0]
    assert set(content[0]) - IMAGE_KEYS == {
        "media_type",
        "author",
        "env",
        "working_dir",
        "user",
        "entrypoint",
        "cmd",
        "labels",
        "exposed_ports",
        "volumes",
        "stop_signal",
        "shell",
        "healthcheck",
        "on_build",
    }


def test_history(cli: Cli, base: FakeImage) -> None:
    first, second = (diff_id[7:19] for diff_id in base.config.diff_ids)
    low, top = (f"{one.size_bytes} B" for one in base.manifest.layers)
    assert cli("history", "base:1").splitlines() == [
        "CREATED      LAYER          SIZE    CREATED BY",
        f"1970-01-01   {second}   {top:<5}   step 1",
        f"1970-01-01   {first}   {low:<5}   step 0",
    ]
    assert base.config.diff_ids[0] in cli("history", "base:1", "--no-trunc")
    content = cli.json("history", "base:1")
    assert set(content) == {*IMAGE_KEYS, "history"}
    assert [row["created_by"] for row in content["history"]] == ["step 1", "step 0"]
    assert [row["diff_id"] for row in content["history"]] == list(base.config.diff_ids)[::-1]


# Names


def test_tag_and_remove(cli: Cli, base: FakeImage) -> None:
    assert cli("tag", "base:1", "mine", "localhost:5000/a/b:3") == (
        f"Tagged {shown_id(base)} as mine:latest\nTagged {shown_id(base)} as localhost:5000/a/b:3\n"
    )
    assert cli("remove", "mine", "base:1") == "Untagged mine:latest\nUntagged base:1\nFreed 0 B\n"
    assert "several" not in cli.refused("remove", base.manifest.digest)
    assert "has the names" in cli.err
    assert "--force" in cli.err
    content = cli.json("rmi", "-f", shown_id(base))
    assert content["names"] == ["docker.io/library/base:2", "localhost:5000/a/b:3"]
    assert content["images"] == [base.manifest.digest]
    assert content["freed_bytes"] > 0
    assert len(cli.json("list")["images"]) == 1


def test_prune_says_what_it_took(cli: Cli, base: FakeImage) -> None:
    without_name = image_of([SHELL]).manifest.digest
    out = cli("prune")
    assert out.startswith(
        f"Removed {without_name[7:19]}\nImages: 1, blobs: 2, unpacked layers: 0\n"
    )
    assert re.search(r"\nFreed [1-9]\d* (B|KiB)\n\Z", out)
    content = cli.json("prune", "--all", "--build-cache", "--keep", "1M", "--older-than", "1d")
    assert content["images"] == []
    assert set(content) == {
        "version",
        "images",
        "build_cache_records",
        "blobs",
        "layers",
        "cache_mounts",
        "freed_bytes",
    }
    assert cli.json("prune", "-a")["images"] == [base.manifest.digest]
    assert cli.json("disk-usage")["total_bytes"] == 0


def test_disk_usage(cli: Cli, base: FakeImage) -> None:
    content = cli.json("disk-usage")
    assert set(content) == {
        "version",
        "images",
        "images_bytes",
        "build_cache_records",
        "build_cache_bytes",
        "cache_mounts",
        "cache_mounts_bytes",
        "unused_bytes",
        "total_bytes",
    }
    named, other = content["images"]
    assert named["names"] == ["docker.io/library/base:1", "docker.io/library/base:2"]
    assert named["shared_bytes"] == other["shared_bytes"] == base.manifest.layers[0].size_bytes
    out = cli("du", "-v").splitlines()
    assert out[0].split() == ["IMAGE", "NAMES", "SIZE", "SHARED", "UNIQUE", "IN", "USE"]
    assert out[1].startswith(f"{named['digest'][7:19]}   base:1, base:2   ")
    assert out[1].endswith("   no")
    assert [line.split("  ")[0] for line in out[4:]] == [
        "TYPE",
        "Images",
        "Build cache",
        "Cache mounts",
        "Unused",
        "Total",
    ]
    assert cli("disk-usage").splitlines() == out[4:]


# Files


@pytest.mark.parametrize("kind", ["oci", "oci-dir", "docker"])
def test_export_and_import(cli: Cli, base: FakeImage, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    assert cli("export", "base:1", "-o", out, "--format", kind) == f"Exported base:1 to {out}\n"
    assert out.is_dir() == (kind == "oci-dir")
    cli("remove", "-f", shown_id(base))
    cli("prune", "--all")
    assert cli("import", out) == f"Imported base:1 ({shown_id(base)})\n"
    assert "imported, " in cli.err
    assert cli("load", "-i", out, "-q") == f"{base.config.image_id}\n"
    content = cli.json("import", out, "--name", "again:1")
    assert [one["reference"] for one in content["images"]] == ["docker.io/library/again:1"]


def test_the_output_tells_the_format(cli: Cli, base: FakeImage, tmp_path: Path) -> None:
    content = cli.json("export", "base:1", "-o", f"{tmp_path}/new/")
    assert content["format"] == "oci"
    assert (tmp_path / "new" / "oci-layout").is_file()
    assert cli.json("save", "base:1", "-o", tmp_path / "a.tar")["format"] == "oci-archive"


def test_a_root_file_system_comes_over_stdin(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    give_stdin(monkeypatch, tar_of(SHELL))
    assert "--name" in cli.refused("import", "-")
    give_stdin(monkeypatch, tar_of(SHELL))
    assert cli("import", "-", "--name", "root").startswith("Imported root:latest (")


# Registries


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    found = FakeRegistry()
    yield found
    found.close()


@pytest.fixture
def remote(registry: FakeRegistry) -> RemoteImage:
    image = RemoteImage((layer(("a", b"a" * 5000)), layer(("b", b"b"))))
    registry.put(image)
    return image


def test_pull_and_push(cli: Cli, registry: FakeRegistry, remote: RemoteImage) -> None:
    name = f"{registry.host}/team/app:1"
    out = cli("pull", name)
    assert out.startswith(f"Pulled {name}: {digest_of(remote.raw)}, layers: 2, ")
    lines = cli.err.splitlines()
    assert lines[0] == f"Pulling {name}"
    words = sorted(line.split()[1] for line in lines[1:])
    assert words == ["pulled,"] * 3 + ["unpacked,"] * 2
    assert cli("pull", "-q", name) == f"{digest_of(remote.config)}\n"
    assert cli.err == ""
    assert cli.json("pull", name)["digest"] == digest_of(remote.raw)
    assert cli.err == f"Pulling {name}\n"
    to = f"{registry.host}/team/copy:2"
    assert cli("push", name, to) == f"Pushed {to}: {digest_of(remote.raw)}\n"
    assert cli.json("push", name) == {
        "version": 1,
        "reference": name,
        "digest": digest_of(remote.raw),
    }
    assert registry.manifests["team/copy:2"][0] == remote.raw


def test_an_image_for_another_platform_is_not_pushed(
    cli: Cli, registry: FakeRegistry, remote: RemoteImage
) -> None:
    name = f"{registry.host}/team/app:1"
    cli("pull", name)
    error = cli.refused("push", name, "--platform", "plan9/mips")
    assert "not for plan9/mips" in error
    assert "--platform plan9/mips" in error


def test_what_a_registry_says_reaches_no_terminal(cli: Cli, registry: FakeRegistry) -> None:
    evil = json.dumps({"errors": [{"code": "DENIED", "message": "no\x1b]0;owned\x07 way"}]})
    registry.rule("GET", "manifests", lambda handler: handler.answer(403, evil.encode()), 0)
    error = cli.refused("pull", f"{registry.host}/team/app:1")
    assert "\x1b" not in error
    assert "\x07" not in error


# Builds without a container


def test_build_from_scratch(cli: Cli, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / "a.txt").write_text("a")
    (context / "Containerfile").write_text("FROM scratch\nCOPY a.txt /\nLABEL b=c\n")
    out = cli("build", "-t", "mine", "-t", "mine:2", "--label", "d=e", context)
    assert re.fullmatch(r"Built [0-9a-f]{12} as mine:latest, mine:2, \d+ B\n", out)
    assert re.fullmatch(
        r"\[1/3\] FROM scratch  CACHED\n"
        r"\[2/3\] COPY a.txt /  [\d.]+ m?s\n"
        r"\[3/3\] LABEL b=c  CACHED\n",
        cli.err,
    )
    (context / "a.txt").write_text("b")
    content = cli.json("build", context, "--explain", "--iidfile", tmp_path / "id")
    assert set(content) == {*IMAGE_KEYS, "tags", "steps"}
    assert (tmp_path / "id").read_text() == content["id"]
    assert "\n    not cached: a.txt changed\n[2/3] done: " in cli.err
    assert [step["cached"] for step in content["steps"]] == [True, False, True]
    assert content["steps"][1]["reason"] == "a.txt changed"
    assert set(content["steps"][1]) == {
        "number",
        "stage",
        "title",
        "reason",
        "cached",
        "wall_s",
        "layer",
        "size_bytes",
    }
    assert cli("build", "-q", context) == f"{content['id']}\n"
    assert cli.err == ""
    labels = cli.json("inspect", "mine")["images"][0]["labels"]
    assert labels == {"b": "c", "d": "e"}


def test_the_dockerfile_may_come_over_stdin(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a")
    give_stdin(monkeypatch, b"FROM scratch\nCOPY a.txt /\n")
    cli("build", "-f", "-", "-t", "one", tmp_path)
    give_stdin(monkeypatch, b"FROM scratch\nCOPY a.txt /\n")
    assert "Dockerfile:2: a.txt is not in the build context\n    2 | COPY a.txt /\n" in cli.refused(
        "build", "-"
    )
    give_stdin(monkeypatch, b"ARG WORD\nFROM scratch\nARG WORD\nLABEL word=$WORD\n")
    monkeypatch.setenv("WORD", "from the environment")
    cli("build", "-", "-t", "two", "--build-arg", "WORD", "--build-arg", "UNSET_ONE")
    assert cli.json("inspect", "two")["images"][0]["labels"] == {"word": "from the environment"}


def test_source_date_epoch_counts(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    give_stdin(monkeypatch, b"FROM scratch\nLABEL a=b\n")
    assert cli.json("build", "-")["created"] == "1970-01-02T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "noon")
    assert "SOURCE_DATE_EPOCH=noon" in cli.refused("build", "-", status=2)


def test_a_base_is_pulled(
    cli: Cli, registry: FakeRegistry, remote: RemoteImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{registry.host}/team/app:1"
    dockerfile = f"FROM {name}\nLABEL a=b\n".encode()
    give_stdin(monkeypatch, dockerfile)
    cli("build", "-")
    lines = cli.err.splitlines()
    assert lines[:2] == [f"[1/2] FROM {name}", f"    pulling {name}"]
    assert lines[-2].startswith("[1/2] done: ")
    give_stdin(monkeypatch, dockerfile)
    cli("build", "-")
    assert cli.err.startswith(f"[1/2] FROM {name}  CACHED\n")
    newer = RemoteImage((layer(("c", b"c")),))
    registry.put(newer)
    give_stdin(monkeypatch, dockerfile)
    cli("build", "--pull", "-t", "new", "-")
    assert cli.json("inspect", "new")["images"][0]["layers"][0]["digest"] == digest_of(
        newer.packed[0]
    )


def test_the_tail_of_a_quiet_step_is_told() -> None:
    steps = Steps(PlainScreen())
    steps.take(StepBegun(1, 1, "RUN x"))
    steps.take(StepOutput("stdout", b"".join(b"%d\n" % n for n in range(100)) + b"end"))
    assert steps.failed() == [*map(str, range(81, 100)), "end"]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["build", "nowhere"], ["'nowhere'", "folder"]),
        (["build", "https://example.org/a.git"], ["https://example.org/a.git", "clone"]),
        (["build", "-f", "x", "-"], ["--file x", "standard input"]),
        (["build", ".", "-t", "Upper"], ["'Upper'", "lower case"]),
        (["build", ".", "--build-arg", "=x"], ["--build-arg =x", "NAME=VALUE"]),
        (["build", ".", "--label", "x"], ["--label x", "NAME=VALUE"]),
        (["build", ".", "--platform", "x"], ["'x'", "linux/amd64"]),
        (["build", ".", "--network", "lan"], ["'lan'", "--help"]),
        (["build", ".", "--memory", "2X"], ["'2X'", "512M"]),
        (["build", ".", "--memory", "2"], ["memory=2", "2M"]),
        (["build", ".", "--cpus", "0"], ["cpus=0", "none"]),
        (["build", ".", "--waive", "disk"], ["'disk'", "memory"]),
        (["build", ".", "--waive", "memory", "--memory", "1G"], ["--memory 1G", "leave one"]),
        (["build", ".", "--secret", "src=x"], ["src=x", "id=ID"]),
        (["build", ".", "--secret", "id=a,file=x"], ["'file'", "id=ID"]),
        (["build", ".", "--secret", "id=a,src=gone"], ["gone", "may read"]),
        (["build", ".", "--secret", "id=a,env=NOT_SET_1"], ["NOT_SET_1", "src=FILE"]),
        (["build", ".", "--secret", "id=a,src=x,env=Y"], ["src and env", "leave one"]),
        (["build", ".", "--progress", "tty"], ["--progress tty", "plain"]),
        (["build"], ["CONTEXT", "--help"]),
        (["pull", "http://x/y"], ["'http://x/y'", "leave out"]),
        (["pull", "x", "--platform", "amd64"], ["'amd64'", "linux/amd64"]),
        (["tag", "x", "Y"], ["'Y'", "lower case"]),
        (["tag", "x", f"y@sha256:{'0' * 64}"], ["digest", "tag only"]),
        (["import"], ["FILE", "standard input"]),
        (["import", "a", "-i", "b"], ["one FILE", "standard input"]),
        (["export", "x", "-o", "-", "--json"], ["--json", "-o"]),
        (["export", "x"], ["--output", "--help"]),
        (["export", "x", "-o", "a", "--format", "zip"], ["'zip'", "--help"]),
        (["prune", "--older-than", "soon"], ["'soon'", "5s"]),
        (["prune", "--keep", "5G"], ["--keep 5G", "--build-cache"]),
        (["prune", "--build-cache", "--keep", "x"], ["'x'", "512M"]),
        (["lst"], ["'lst'", "--help"]),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(
    cli: Cli, arguments: list[str], words: list[str]
) -> None:
    error = cli.refused(*arguments, status=2)
    assert error.startswith("Error: ")
    assert "\nHint: " in error
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["inspect", "gone"], ["'gone:latest'", "image list"]),
        (["history", "gone"], ["'gone:latest'", "image list"]),
        (["remove", "gone"], ["'gone:latest'", "image list"]),
        (["tag", "gone", "x"], ["'gone:latest'", "image list"]),
        (["push", "gone"], ["'gone:latest'", "image list"]),
        (["export", "gone", "-o", "x"], ["'gone:latest'", "image list"]),
        (["build", "."], ["Dockerfile", "-f FILE"]),
    ],
)
def test_what_is_missing_is_named_with_its_remedy(
    cli: Cli, arguments: list[str], words: list[str]
) -> None:
    error = cli.refused(*arguments)
    assert error.startswith("Error: ")
    assert "\nHint: " in error
    assert all(word in error for word in words), error


def test_a_push_needs_a_name(cli: Cli, base: FakeImage) -> None:
    nameless = shown_id(image_of([SHELL]))
    assert "DESTINATION" in cli.refused("push", nameless, status=2)


def test_an_archive_is_no_dockerfile(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for data in (tar_of(SHELL), b"\x1f\x8b\x08\x00"):
        give_stdin(monkeypatch, data)
        assert "an archive, not a Dockerfile" in cli.refused("build", "-", status=2)


def test_a_dockerfile_that_is_wrong_is_quoted(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    give_stdin(monkeypatch, b"FROM scratch\n\nCOPPY a b\n")
    assert cli.refused("build", "-") == (
        "Error: Dockerfile:3: there is no instruction COPPY\n"
        "    3 | COPPY a b\n"
        "Hint: did you mean COPY?\n"
    )


# Parts


def test_the_help_of_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for name in (*group.COMMANDS, *group.ALIASES):
        assert entry.main(["image", name, "--help"]) == 0
        assert "--json" in capsys.readouterr().out
    assert entry.main(["image", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name}" in out for name in group.COMMANDS)
    assert "rmi" not in out


def test_the_defaults_are_those_of_a_job() -> None:
    assert limits_of({limit.name: None for limit in LIMITS}, ()) == JobLimits()
    assert limits_of({limit.name: str(limit.default) for limit in LIMITS}, ()) == JobLimits()
    assert limits_of({limit.name: None for limit in LIMITS}, ["memory"]).memory_bytes is None


def test_the_kernel_does_not_import_rich_or_the_commands() -> None:
    code = (
        "import sys, sandbox_kernel.kernel.app, sandbox_kernel.kernel.kernel;"
        "print([name for name in sys.modules if name in ('rich', 'sandbox_kernel.cli')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout == "[]\n"


HOSTILE = [
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b]0;title\x07x", "x"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1bP1;2|payload\x1b\\x", "x"),
    ("\x1bcx", "x"),
    ("\x9b2Jx", "2Jx"),
    ("a\x08\x00b\x7f", "ab"),
    ("\u202etxt.exe", "txt.exe"),
    ("tab\tstays", "tab\tstays"),
    ("\x1b", ""),
    ("ü", "ü"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_text_for_a_terminal_is_harmless(text: str, shown: str) -> None:
    assert harmless(text) == shown
    assert list(Lines().take(f"{text}\n".encode())) == [shown]


def test_one_line_is_one_line() -> None:
    assert one_line("a\n\n  b\r\x1b[2Jc\n") == "a b c"


def test_output_is_cut_into_lines() -> None:
    lines = Lines()
    assert list(lines.take(b"a\nb\xc3")) == ["a"]
    assert list(lines.take(b"\xbc\r\n\n 10%\r 50%\r100%\nrest")) == ["bü", "", "100%"]
    assert list(lines.end()) == ["rest"]
    assert list(lines.end()) == []
    assert list(Lines().take(b"\xff\n")) == ["\ufffd"]
    long = list(Lines().take(b"x" * (2 * MAX_LINE + 1)))
    assert long == ["x" * MAX_LINE] * 2
    assert [len(line) for line in Lines().take(b"x" * 10000 + b"\n")] == [4096, 4096, 1808]


def test_a_step_cannot_fake_another(capsys: pytest.CaptureFixture[str]) -> None:
    screen = PlainScreen()
    steps = Steps(screen)
    steps.take(StepBegun(1, 2, "RUN a", "one"))
    steps.take(StepOutput("stdout", b"[2/2] RUN \x1b[1Ab\n"))
    steps.take(Warned("Dockerfile:1: Rule: words"))
    steps.take(StepEnded(1, False, 1.5))
    steps.take(StepBegun(2, 2, "RUN b", "one"))
    steps.take(StepMissed("x\x07 changed"))
    steps.take(StepOutput("stderr", b"without newline"))
    screen.close()
    steps.take(StepEnded(2, False, 0.25))
    assert capsys.readouterr().err == (
        "[1/2 one] RUN a\n"
        "    [2/2] RUN b\n"
        "warning: Dockerfile:1: Rule: words\n"
        "[1/2 one] done: 1.5 s\n"
        "[2/2 one] RUN b\n"
        "    not cached: x changed\n"
        "    without newline\n"
        "[2/2 one] done: 250 ms\n"
    )


def test_bars_leave_the_same_lines(capsys: pytest.CaptureFixture[str]) -> None:
    screen = BarScreen()
    steps = Steps(screen)
    screen.started("sha256:" + "0" * 64, 100)
    screen.advanced("sha256:" + "0" * 64, 50)
    steps.take(StepBegun(1, 2, "RUN [bold]a[/bold]"))
    steps.take(StepOutput("stdout", b"[red]said\n"))
    screen.finished("sha256:" + "0" * 64, "exists")
    steps.take(StepEnded(1, True, 1.5))
    steps.take(StepBegun(2, 2, "RUN b"))
    steps.take(StepEnded(2, False, 1.5))
    screen.close()
    assert capsys.readouterr().err == (
        "[1/2] RUN [bold]a[/bold]\n    [red]said\n[1/2] done: CACHED\n[2/2] RUN b  1.5 s\n"
    )


def test_a_stream_that_is_no_tar_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nonsense" * 100)
    assert "nonsense" not in cli.refused("import", tmp_path / "x")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    cli.refused("import", tmp_path / "empty.tar")
