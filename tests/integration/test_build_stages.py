"""Stages, bases and what an image says of itself in the end; the same image wherever it is built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandbox_kernel.build.session_image import session_image
from sandbox_kernel.errors import BuildError
from tests.integration import driver
from tests.integration.builds import BASE, Workshop, needs_busybox

pytestmark = [pytest.mark.needs("memory", "processes"), needs_busybox]

ROOT = Path(__file__).parents[2]


# Stages


def test_a_stage_that_nothing_needs_is_not_built(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE} AS used\nRUN echo used > /out\n"
        f"FROM {BASE} AS unused\nRUN exit 1\n"
        "FROM scratch\nCOPY --from=used /out /out\n"
    )
    assert {step.stage for step in shop.told.steps} == {"used", "stage-2"}
    assert len(image.manifest.layers) == 1
    assert shop.read(image, "/out") == "used\n"


@pytest.mark.parametrize("target", ["one", "0", "ONE"])
def test_a_target_is_built_and_none_behind_it(shop: Workshop, target: str) -> None:
    text = f"FROM {BASE} AS one\nENV A=1\nRUN touch /a\nFROM one AS two\nENV B=2\nRUN exit 1\n"
    image = shop.build(text, target=target)
    assert ("A", "1") in image.config.env
    assert "B" not in dict(image.config.env)


def test_a_target_that_is_not_there_is_named(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="there is no stage 'tow'") as raised:
        shop.build(f"FROM {BASE} AS two\n", target="tow")
    assert raised.value.hint == "did you mean two?"


def test_a_stage_passes_on_config_files_and_arguments(shop: Workshop) -> None:
    image = shop.build(
        f'FROM {BASE} AS one\nARG GIVEN=arg\nENV E=env\nUSER app\nWORKDIR /tmp\nLABEL l=1\nCMD ["c"]\n'
        "RUN echo one > /tmp/one\n"
        "FROM one\nRUN echo $GIVEN $E $(id -u) $(pwd) $(cat one)\n"
    )
    assert shop.told.out() == "arg env 1234 /tmp one\n"
    config = image.config
    assert (config.user, config.working_dir, config.labels, config.cmd) == (
        "app", "/tmp", (("l", "1"),), ("c",),
    )  # fmt: skip


def test_copy_takes_from_a_stage_by_name_and_number(shop: Workshop) -> None:
    image = shop.build(
        f"FROM {BASE} AS one\nRUN mkdir -p /d/e && echo x > /d/e/f && ln -s e/f /d/l && chmod 4711 /d/e/f\n"
        "FROM scratch\nCOPY --from=one /d /by-name/\nCOPY --from=0 /d/e/f /by-number\n"
    )
    assert shop.read(image, "/by-name/e/f") == "x\n"
    assert shop.read(image, "/by-name/l") == "x\n"
    assert shop.layer(image)["by-number"].mode == 0o4711


def test_copy_takes_from_an_image_by_name_and_digest(shop: Workshop) -> None:
    other = shop.build(f"FROM {BASE}\nRUN echo there > /there\n", tag="other:1")
    text = "FROM scratch\nCOPY --from=NAME /there /here\n"
    for name in ("other:1", f"other@{other.digest}"):
        assert shop.read(shop.build(text.replace("NAME", name)), "/here") == "there\n"


def test_from_an_image_by_digest(shop: Workshop) -> None:
    base = shop.store.resolve(BASE)
    image = shop.build(f"FROM {BASE}@{base.digest}\nRUN touch /a\n")
    assert image.manifest.layers[0] == base.manifest.layers[0]


def test_an_image_that_is_not_there_is_named_with_its_line(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="nowhere") as raised:
        shop.build("ARG A=1\nFROM nowhere:1\n")
    assert "Dockerfile:2" in str(raised.value)


def test_an_argument_before_from(shop: Workshop) -> None:
    shop.add_base("shell:2")
    text = "ARG VERSION=2\nFROM shell:${VERSION}\nRUN echo ${VERSION-unset}\nARG VERSION\nRUN echo $VERSION\n"
    shop.build(text)
    assert shop.told.out() == "unset\n2\n"
    with pytest.raises(BuildError, match="shell:3"):
        shop.build(text, arguments={"VERSION": "3"})


def test_on_build_fires_in_the_image_that_builds_on_it(shop: Workshop) -> None:
    base = shop.build(
        f"FROM {BASE}\nONBUILD COPY f /copied\nONBUILD RUN cat /copied\nONBUILD ENV FIRED=1\n",
        tag="trigger",
    )
    assert base.config.on_build == ("COPY f /copied", "RUN cat /copied", "ENV FIRED=1")
    shop.write({"f": "of the context\n"})
    image = shop.build("FROM trigger\nRUN echo $FIRED\n")
    assert shop.told.out() == "of the context\n1\n"
    assert image.config.on_build == ()
    grandchild = shop.build("FROM trigger AS one\nFROM one\nRUN echo $FIRED\n")
    assert grandchild.config.on_build == ()
    assert shop.told.rebuilt == []


def test_an_on_build_that_fails_names_the_from(shop: Workshop) -> None:
    shop.build(f"FROM {BASE}\nONBUILD COPY missing /\n", tag="trigger")
    with pytest.raises(BuildError, match="missing") as raised:
        shop.build("FROM trigger\n")
    assert "Dockerfile:1" in str(raised.value)


def test_an_on_build_may_copy_from_a_stage(shop: Workshop) -> None:
    shop.build(f"FROM {BASE}\nONBUILD COPY --from=made /out /taken\n", tag="trigger")
    image = shop.build(f"FROM {BASE} AS made\nRUN echo x > /out\nFROM trigger\n")
    assert shop.read(image, "/taken") == "x\n"


# This machine's image


@pytest.mark.asyncio
@pytest.mark.kernel
async def test_a_session_sees_what_was_built_from_host(
    shop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_KERNEL_STORE", str(shop.store.folder))
    shop.write({"lib/answer.py": "VALUE = 42\n"})
    shop.build(
        "FROM host\nENV COLOUR=blue\nWORKDIR /srv/app\nCOPY lib /srv/app/lib/\n"
        "RUN python3 -c 'import sys; print(sys.version_info[:2])' > made; ls lib\n"
        "ENV PYTHONPATH=/srv/app/lib\n",
        tag="ours",
    )
    assert shop.told.out() == "answer.py\n"
    (tmp_path / "ws").mkdir()
    session = await driver.start(tmp_path / "ws", image=session_image("ours"))
    try:
        assert await session.value("__import__('answer').VALUE") == 42
        assert await session.value("__import__('os').environ['COLOUR']") == "blue"
        assert await session.value("open('/srv/app/made').read()") == f"{sys.version_info[:2]}\n"
    finally:
        await driver.stop(session)


def test_a_build_from_host_says_so_in_its_labels_and_builds_on(shop: Workshop) -> None:
    shop.build("FROM host\nRUN echo 1 > /one\n", tag="first")
    image = shop.build("FROM first\nRUN python3 -c 'print(open(\"/one\").read())'\n")
    assert shop.told.out() == "1\n\n"
    assert len(image.manifest.layers) == 1


def test_a_step_cannot_write_to_the_machine(shop: Workshop) -> None:
    with pytest.raises(BuildError, match="exit code"):
        shop.build("FROM host\nRUN touch /usr/bin/sandbox-kernel-was-here\n")
    assert "Read-only file system" in shop.told.out("stderr")
    assert not Path("/usr/bin/sandbox-kernel-was-here").exists()


def test_no_folder_of_the_machine_is_in_a_layer(shop: Workshop) -> None:
    image = shop.build("FROM host\nRUN mkdir -p /opt/x; touch /opt/x/y; ls /usr/bin > /dev/null\n")
    assert set(shop.layer(image)) <= {"opt", "opt/x", "opt/x/y"}


# The config

EVERYTHING = f"""FROM {BASE}
ENV ONE=1 TWO="two words"
LABEL org.example.a=b "with space"="and \\"quotes\\""
WORKDIR /srv/app
USER app:staff
EXPOSE 80 53/udp
VOLUME ["/data", "/more"]
STOPSIGNAL SIGINT
ENTRYPOINT ["/bin/serve", "--all"]
CMD serve --port 80
HEALTHCHECK --interval=5s --retries=3 CMD curl localhost
RUN touch /tmp/x
"""


def skopeo(*words: str) -> str:
    done = subprocess.run(["skopeo", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.programs("skopeo")
def test_the_config_says_what_the_dockerfile_said(shop: Workshop) -> None:
    image = shop.build(EVERYTHING, tag="example.org/all:1", labels={"given": "later"})
    layout = f"oci:{shop.store.folder}:example.org/all:1"
    config = json.loads(skopeo("inspect", "--config", layout))
    assert config["config"] == {
        "Env": [
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "ONE=1",
            "TWO=two words",
        ],
        "Labels": {"org.example.a": "b", "with space": 'and "quotes"', "given": "later"},
        "WorkingDir": "/srv/app",
        "User": "app:staff",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Volumes": {"/data": {}, "/more": {}},
        "StopSignal": "SIGINT",
        "Entrypoint": ["/bin/serve", "--all"],
        "Cmd": ["/bin/sh", "-c", "serve --port 80"],
    }
    # skopeo leaves Docker's own fields out; they are in the blob all the same.
    raw = json.loads(skopeo("inspect", "--config", "--raw", layout))
    assert raw["config"]["Healthcheck"] == {
        "Test": ["CMD-SHELL", "curl localhost"],
        "Interval": 5_000_000_000,
        "Retries": 3,
    }
    assert raw == json.loads(image.config.raw)
    assert raw["created"] == "1970-01-01T00:00:00Z"
    seen = json.loads(skopeo("inspect", layout))
    assert seen["Layers"] == [layer.digest for layer in image.manifest.layers]


@pytest.mark.programs("skopeo")
def test_skopeo_copies_what_was_built(shop: Workshop) -> None:
    image = shop.build(EVERYTHING, tag="example.org/all:1")
    target = shop.root / "copy"
    skopeo(
        "--insecure-policy", "--tmpdir", str(shop.root), "copy", "--preserve-digests",
        f"oci:{shop.store.folder}:example.org/all:1", f"oci:{target}:all",
    )  # fmt: skip
    index = json.loads((target / "index.json").read_text())
    assert [one["digest"] for one in index["manifests"]] == [image.digest]


def test_history_has_a_row_for_each_instruction(shop: Workshop) -> None:
    image = shop.build(EVERYTHING)
    rows = image.config.history[1:]
    lines = [row.created_by for row in rows]
    assert [line.split()[0] for line in lines] == [
        line.split()[0] for line in EVERYTHING.splitlines()[1:]
    ]
    filled = [row.created_by for row in rows if not row.empty_layer]
    assert filled == ["WORKDIR /srv/app", "RUN touch /tmp/x"]
    assert len(image.config.diff_ids) == 1 + len(filled)
    chain = shop.store.history(image)
    assert chain[0].created_by == "RUN touch /tmp/x"
    assert sum(row.size_bytes > 0 for row in chain) == 3


# The same everywhere

SAME = """FROM BASE
ENV A=1
WORKDIR /srv/app
COPY . /srv/app/
RUN cat /etc/passwd | sort > /srv/app/out; mkdir -p /b/a /a/b; for n in 9 1 5; do echo $n > /b/$n; done; umask
ADD archive.tar /added/
"""
FILES = {"z": "1", "a/b": "2", "a/c": "3", "run.sh": "#!/bin/sh\n"}


def prepare(shop: Workshop) -> None:
    shop.write({**FILES, ".dockerignore": "*.log\n"})
    (shop.context / "run.sh").chmod(0o755)
    subprocess.run(
        ["tar", "--mtime=@5", "--sort=name", "--owner=3", "--group=4", "-cf", "../archive.tar", "a"],
        cwd=shop.context, check=True,
    )  # fmt: skip
    (shop.root / "archive.tar").rename(shop.context / "archive.tar")


def test_the_same_context_gives_the_same_image_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = SAME.replace("BASE", BASE)
    found = []
    for number, (umask, zone, language) in enumerate(
        [
            (0o022, "UTC", "C"),
            (0o077, "Asia/Tokyo", "de_DE.UTF-8"),
            (0o002, "America/Lima", "tr_TR"),
        ]
    ):
        shop = Workshop(tmp_path / f"place-{number}")
        shop.add_base()
        prepare(shop)
        monkeypatch.setenv("TZ", zone)
        monkeypatch.setenv("LC_ALL", language)
        monkeypatch.chdir(shop.root)
        for path in shop.context.rglob("*"):
            os.utime(path, (10**9 + number, 10**9 + number))
        before = os.umask(umask)
        try:
            found.append(shop.build(text, tag=f"name{number}"))
        finally:
            os.umask(before)
            shop.close()
    assert len({image.image_id for image in found}) == 1
    assert len({image.digest for image in found}) == 1


_AS_USER = """
import os, sys
from pathlib import Path
from sandbox_kernel.build.builder import build
from sandbox_kernel.build.options import BuildOptions
from sandbox_kernel.image.store import Store
from tests.integration.builds import WAIVED, Told, base_tar, BASE
from sandbox_kernel.image.archive import ImportOptions, import_archive
from sandbox_kernel.image.reference import Reference
import io
root = Path(sys.argv[1])
with Store.open(root / "store") as store:
    import_archive(store, io.BytesIO(base_tar()), ImportOptions(name=Reference.parse(BASE)))
    print(build(store, BuildOptions(root / "context", root / "Dockerfile", limits=WAIVED), Told()).digest)
"""


@pytest.fixture
def theirs() -> Iterator[Path]:
    """Give a folder of another user's, which pytest's own are closed to."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else too")
    with tempfile.TemporaryDirectory(prefix="sandbox-kernel-theirs-") as folder:
        os.chown(folder, OTHER, OTHER)
        try:
            why = as_other(Path(folder), "import tests.integration.builds").stderr
        except PermissionError as error:  # an interpreter in somebody's home folder
            why = str(error)
        if why:
            pytest.skip(f"another user cannot run this: {why.strip()[-200:]}")
        yield Path(folder)


OTHER = 4321


def as_other(home: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=ROOT, user=OTHER, group=OTHER, extra_groups=[], umask=0o077, capture_output=True, text=True,
        env={"HOME": str(home), "PATH": os.environ["PATH"], "TMPDIR": str(home)},
    )  # fmt: skip


def test_files_of_a_context_give_the_same_image_for_another_user(
    shop: Workshop, theirs: Path
) -> None:
    """Without RUN: what its container needs is for each user to have, and asked of `doctor`."""
    text = f"FROM {BASE}\nWORKDIR /srv/app\nCOPY --chown=app . /srv/app/\nADD archive.tar /added/\n"
    prepare(shop)
    image = shop.build(text)
    shutil.copytree(shop.context, theirs / "context")
    (theirs / "Dockerfile").write_text(text)
    done = as_other(theirs, _AS_USER, str(theirs))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == image.digest
