"""Sessions on images of the store: Debian of three ages, and layers on top that mean no good."""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from sandbox_kernel.build.agent_image import Unpacked, image_interpreter
from sandbox_kernel.build.layer import layer_of_tar
from sandbox_kernel.errors import ImageError, LaunchError
from sandbox_kernel.image.archive import import_archive
from sandbox_kernel.image.archive_parts import ImportOptions
from sandbox_kernel.image.documents import OCI_CONFIG, Descriptor, Manifest
from sandbox_kernel.image.layered import AGENT, layered_image
from sandbox_kernel.image.reference import Reference
from sandbox_kernel.image.store import Store
from sandbox_kernel.image.stored_image import StoredImage
from sandbox_kernel.model import Image, InputRequest, Outcome
from tests.integration import driver as driving
from tests.integration.driver import Driver
from tests.integration.rootfs import PYTHONS, rootfs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.needs("user_namespace", "overlay", "seccomp", "memory", "processes"),
]
MIB = 1 << 20
Entry = tuple[str, str, Any]
"""A path; `file`, `program`, `setuid`, `folder`, `link` or `fifo`; content or target."""


@dataclass
class Shelf:
    """A store with Debian in it, and images on top of that."""

    store: Store

    def debian(self, suite: str) -> StoredImage:
        try:
            return self.store.resolve(suite)
        except ImageError:
            options = ImportOptions(name=Reference.parse(suite))
            import_archive(self.store, rootfs(suite), options)
            return self.store.resolve(suite)

    def on_top(self, base: StoredImage | None, *entries: Entry, **config: Any) -> StoredImage:
        """Give an image with one more layer, and with changes of its config."""
        layer = layer_of_tar(self.store, io.BytesIO(tar(*entries)))
        assert layer is not None
        below = base if base is not None else self.debian("bookworm")
        diff_ids = (*(below.config.diff_ids if base else ()), layer.diff_id)
        raw = replace(below.config, diff_ids=diff_ids, history=(), **config).render()
        blob = Descriptor(OCI_CONFIG, self.store.put_blob(raw), len(raw))
        layers = [*(below.manifest.layers if base else ()), layer.blob]
        return self.store.put_image(None, Manifest.build(blob, layers).raw)

    def plan(self, image: StoredImage, name: str = "test") -> Image:
        layers = self.store.session_layers(image)
        unpacked = Unpacked(name, image, layers)
        interpreter = image_interpreter(self.store, unpacked, lambda _: None)
        return layered_image(name, image.config, layers, interpreter)


def tar(*entries: Entry) -> bytes:
    """Make the tar of a layer."""
    out = io.BytesIO()
    kinds = {"folder": tarfile.DIRTYPE, "link": tarfile.SYMTYPE, "fifo": tarfile.FIFOTYPE}
    modes = {"program": 0o755, "setuid": 0o4755, "folder": 0o755}
    with tarfile.open(fileobj=out, mode="w") as file:
        for path, kind, content in entries:
            info = tarfile.TarInfo(path)
            info.type = kinds.get(kind, tarfile.REGTYPE)
            info.mode = modes.get(kind, 0o644)
            data = b""
            if kind == "link":
                info.linkname = content
            elif kind not in kinds:
                data = content if isinstance(content, bytes) else str(content).encode()
                info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shelf]:
    with Store.open(tmp_path_factory.mktemp("images") / "store") as store:
        yield Shelf(store)


@asynccontextmanager
async def session(image: Image, workspace: Path, **changes: Any) -> AsyncIterator[Driver]:
    box = await driving.start(workspace, image=image, **changes)
    try:
        yield box
    finally:
        await driving.stop(box)


async def value(box: Driver, expression: str) -> Any:
    """Give the value of an expression, which may be several."""
    return await box.value(f"({expression})")


# ---- one session on each Debian


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=PYTHONS)
async def debian(
    request: pytest.FixtureRequest, shelf: Shelf, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[str, Driver]]:
    plan = shelf.plan(shelf.debian(request.param), request.param)
    async with session(plan, tmp_path_factory.mktemp("workspace")) as box:
        yield request.param, box


@pytest.mark.asyncio(loop_scope="module")
async def test_the_images_own_python_runs_cells(debian: tuple[str, Driver]) -> None:
    suite, box = debian
    assert await value(box, "__import__('sys').version_info[:2]") == PYTHONS[suite]
    assert suite in await value(box, "open('/etc/os-release').read()")
    assert (await value(box, "__import__('IPython').__file__")).startswith(f"{AGENT}/")
    ids = await value(box, "__import__('os').getresuid() + __import__('os').getresgid()")
    assert ids == (1000,) * 6


@pytest.mark.asyncio(loop_scope="module")
async def test_no_start_compiles_the_agent(debian: tuple[str, Driver]) -> None:
    _, box = debian
    cached = await value(box, "__import__('IPython').__cached__")
    assert await value(box, f"__import__('os').path.exists({cached!r})")


@pytest.mark.asyncio(loop_scope="module")
async def test_variables_and_files_are_carried_and_rolled_back(debian: tuple[str, Driver]) -> None:
    _, box = debian
    await box.ok("kept = [1]\nopen('/workspace/kept', 'w').write('1')\nopen('/var/tmp/k', 'w')")
    code = "kept.append(2)\nopen('kept', 'w').write('2')\nlost = bytearray(400 << 20)"
    ran = await box.run(code, memory_bytes=256 * MIB)
    assert ran.outcome is Outcome.MEMORY, ran.said()
    ran = await box.run("import os\nos.remove('/var/tmp/k')\nos._exit(3)")
    assert ran.outcome is Outcome.EXITED, ran.said()
    assert await value(box, "kept, open('kept').read(), 'lost' in globals()") == ([1], "1", False)
    assert await value(box, "__import__('os').path.exists('/var/tmp/k')")


@pytest.mark.asyncio(loop_scope="module")
async def test_an_error_shows_where_it_was(debian: tuple[str, Driver]) -> None:
    _, box = debian
    ran = await box.run("def quotient():\n    return 1 / 0\nquotient()")
    assert ran.outcome is Outcome.ERROR, ran.said()
    assert ran.result.reply["ename"] == "ZeroDivisionError"
    assert "line 2" in ran.trace
    assert "return 1 / 0" in ran.trace


@pytest.mark.asyncio(loop_scope="module")
async def test_input_is_asked_for(debian: tuple[str, Driver]) -> None:
    _, box = debian

    def reply(event: object) -> None:
        if isinstance(event, InputRequest):
            box.session.answer(event.prompt.upper())

    assert await box.ok("print(input('who? '))", allow_stdin=True, on_event=reply) == "WHO? \n"


@pytest.mark.asyncio(loop_scope="module")
async def test_completion(debian: tuple[str, Driver]) -> None:
    _, box = debian
    await box.ok("import textwrap")
    content = {"code": "textwrap.ded", "cursor_pos": 12}
    found = await box.session.ask("complete_request", content)
    assert "textwrap.dedent" in found["matches"] or "dedent" in found["matches"]


@pytest.mark.asyncio(loop_scope="module")
async def test_displays_comms_magics_and_subprocesses(debian: tuple[str, Driver]) -> None:
    _, box = debian
    ran = await box.run(
        "from comm import create_comm\n"
        "opened = create_comm(target_name='gauge', data={'at': 1})\n"
        "from IPython.display import HTML, display\n"
        "display(HTML('<b>x</b>'))\n"
        "!echo from a shell\n"
        "import asyncio\n"
        "await asyncio.sleep(0)\n"
        "6 * 7"
    )
    assert ran.outcome is Outcome.OK, ran.said()
    assert [one.content["target_name"] for one in ran.messages("comm_open")] == ["gauge"]
    assert ran.messages("display_data")[0].content["data"]["text/html"] == "<b>x</b>"
    assert ran.messages("execute_result")[0].content["data"]["text/plain"] == "42"
    assert "from a shell" in ran.text()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_cell_is_interrupted(debian: tuple[str, Driver]) -> None:
    _, box = debian
    ran = await box.interrupted("n = 5\nprint('up')\nimport time\ntime.sleep(30)")
    assert ran.outcome is Outcome.INTERRUPTED, ran.said()
    assert await value(box, "n") == 5


@pytest.mark.asyncio(loop_scope="module")
async def test_threads_of_the_library(debian: tuple[str, Driver]) -> None:
    _, box = debian
    await box.ok("from concurrent.futures import ThreadPoolExecutor")
    assert await value(box, "ThreadPoolExecutor(2).submit(abs, -3).result()") == 3


@pytest.mark.asyncio(loop_scope="module")
async def test_processes_of_the_library(debian: tuple[str, Driver]) -> None:
    _, box = debian
    await box.ok("import multiprocessing\nforks = multiprocessing.get_context('fork')")
    await box.ok("with forks.Pool(2) as pool:\n    print(pool.map(abs, [-1, -2]))")


# ---- what the config of an image says


async def test_env_and_working_dir_of_the_image_count(shelf: Shelf, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("here")
    base = shelf.debian("bookworm")
    image = shelf.on_top(
        base, ("srv/app/data", "file", "x"),
        env=(("PATH", "/opt/bin:/usr/bin:/bin"), ("MODE", "a b"), ("HOME", "/srv")),
        working_dir="/srv/app",
    )  # fmt: skip
    async with session(shelf.plan(image), tmp_path) as box:
        await box.ok("import os")
        assert await value(box, "os.getcwd(), os.listdir()") == ("/srv/app", ["data"])
        found = await value(box, "[os.environ[n] for n in ('PATH', 'MODE', 'HOME')]")
        assert found == ["/opt/bin:/usr/bin:/bin", "a b", "/srv"]
        assert await value(box, "open('/workspace/note').read()") == "here"


@pytest.mark.parametrize(
    ("user", "ids"),
    [
        ("", (1000, 1000)),
        ("0", (1000, 1000)),  # root of an image is who runs the session's init
        ("root", (1000, 1000)),
        ("5", (5, 60)),  # games, by the image's own table
        ("nobody", (65534, 65534)),
        ("1001", (1001, 1001)),  # the number that heads have otherwise
        ("4711:4712", (4711, 4712)),
    ],
)  # fmt: skip
async def test_cells_run_as_the_user_of_the_image(
    shelf: Shelf, tmp_path: Path, user: str, ids: tuple[int, int]
) -> None:
    image = shelf.on_top(shelf.debian("bookworm"), ("note", "file", user), user=user)
    async with session(shelf.plan(image), tmp_path) as box:
        await box.ok("import os, pwd\nopen('own', 'w').write('1')")
        home = await value(box, "os.environ['HOME']")
        if home == "/home/jovyan":  # the image's own accounts have homes of the image
            await box.ok("open('/home/jovyan/own', 'w')")
        assert await value(box, "os.getresuid(), os.getresgid()") == ((ids[0],) * 3, (ids[1],) * 3)
        assert await value(box, "pwd.getpwuid(os.getuid()).pw_name == os.environ['USER']")
        ran = await box.run("os.remove('own')\nos._exit(1)")
        assert ran.outcome is Outcome.EXITED, ran.said()
        assert await value(box, "open('own').read(), os.stat('own').st_uid") == ("1", ids[0])
        # The head is another user, out of the reach of cells.
        await box.ok(
            "import signal\ntry:\n    os.kill(-1, signal.SIGKILL)\nexcept OSError:\n    pass"
        )
        assert await value(box, "1 + 1") == 2


async def test_a_user_that_the_image_does_not_know_is_named(shelf: Shelf) -> None:
    image = shelf.on_top(shelf.debian("bookworm"), ("note", "file", ""), user="ghost")
    with pytest.raises(ImageError, match=r"there is no user 'ghost' in the image's /etc/passwd"):
        shelf.plan(image)


# ---- layers


async def test_whiteouts_and_opaque_folders_hide_what_is_below(
    shelf: Shelf, tmp_path: Path
) -> None:
    below = shelf.on_top(
        shelf.debian("bookworm"),
        ("opt/a/old", "file", "1"), ("opt/a/gone", "file", "2"), ("opt/b/old", "file", "3"),
        ("opt/c", "folder", None),
    )  # fmt: skip
    image = shelf.on_top(
        below,
        ("opt/a/.wh.gone", "file", ""), ("opt/b/.wh..wh..opq", "file", ""),
        ("opt/b/new", "file", "4"), ("opt/.wh.c", "file", ""), ("usr/bin/.wh.perl", "file", ""),
    )  # fmt: skip
    async with session(shelf.plan(image), tmp_path) as box:
        await box.ok("import os")
        assert await value(box, "sorted(os.listdir('/opt'))") == ["a", "b", "sandbox-kernel"]
        assert await value(box, "os.listdir('/opt/a'), os.listdir('/opt/b')") == (["old"], ["new"])
        assert not await value(box, "os.path.lexists('/usr/bin/perl')")


async def test_setuid_programs_of_an_image_give_nothing(shelf: Shelf, tmp_path: Path) -> None:
    base = shelf.debian("bookworm")
    python = shelf.store.session_layers(base)
    program = Path(python.folder, python.names[0], "usr/bin/id").read_bytes()
    image = shelf.on_top(base, ("usr/local/bin/suid-id", "setuid", program))
    async with session(shelf.plan(image), tmp_path) as box:
        await box.ok("import os, subprocess")
        assert await value(box, "oct(os.stat('/usr/local/bin/suid-id').st_mode)") in (
            "0o104755", "0o100755",
        )  # fmt: skip
        assert (
            await box.ok("print(subprocess.check_output(['suid-id', '-u'], text=True))")
            == "1000\n\n"
        )
        status = await value(box, "open('/proc/self/status').read()")
        assert "NoNewPrivs:\t1" in status


# ---- images that mean no good: escape probes 4 to 7 and 42


@pytest.fixture
def bait(tmp_path: Path) -> Callable[[], set[str]]:
    """Give what is in a folder of the host that links of an image lead to."""
    folder = tmp_path / "bait"
    folder.mkdir()
    (folder / "null").write_text("untouched")
    return lambda: {f"{path.name}={path.read_text()}" for path in folder.iterdir()}


@pytest.mark.escape
@pytest.mark.parametrize(
    "entries",
    [
        [("dev", "link", "{bait}")],
        [("dev/null", "link", "/proc/sysrq-trigger")],
        [("dev/null", "link", "{bait}/null")],
        [("dev/pts", "link", "{bait}")],
        [("dev/pts/0", "link", "{bait}/null"), ("dev/console", "link", "{bait}/null")],
        [("dev/shm", "link", "{bait}")],
        [("dev/tty", "fifo", None), ("dev/zero", "file", "no zeros")],
        [("proc", "link", "{bait}")],
        [("proc/self", "link", "{bait}"), ("proc/keys", "file", "x")],
        [("tmp", "link", "{bait}"), ("workspace", "link", "{bait}")],
        [("opt", "link", "{bait}")],
        [("opt/sandbox-kernel", "link", "{bait}")],
        [("home", "link", "{bait}"), ("root", "link", "{bait}")],
        [("etc/hosts", "link", "{bait}/null"), ("etc/resolv.conf", "link", "/proc/1/environ")],
        [("etc/hosts", "fifo", None), ("etc/resolv.conf", "folder", None)],
    ],
    ids=lambda entries: "+".join(f"{path}-{kind}" for path, kind, _ in entries).replace("/", "_"),
)  # fmt: skip
async def test_links_of_an_image_lead_nowhere(
    shelf: Shelf, tmp_path: Path, bait: Callable[[], set[str]], entries: list[Entry]
) -> None:
    hidden = [(_whiteout(path), "file", "") for path, _, _ in entries]
    folder = str(tmp_path / "bait")
    led = [
        (path, kind, target.replace("{bait}", folder) if kind == "link" else target)
        for path, kind, target in entries
    ]
    clean = shelf.on_top(shelf.debian("bookworm"), *hidden)
    image = shelf.on_top(clean, *led)
    before = bait()
    (tmp_path / "w").mkdir()
    async with session(shelf.plan(image), tmp_path / "w") as box:
        await box.ok("import os, stat")
        real = await value(
            box, "[os.major(os.stat(f'/dev/{n}').st_rdev) for n in ('null', 'zero', 'tty')]"
        )
        assert real == [1, 1, 5]
        assert await value(box, "open('/dev/null').read(), open('/dev/zero', 'rb').read(2)") == (
            "", b"\0\0",
        )  # fmt: skip
        assert await value(box, "os.readlink('/proc/self') == str(os.getpid())")
        assert await value(box, "open('/proc/keys').read()") == ""
        await box.ok("open('/tmp/t', 'w'); open('/workspace/w', 'w'); open('/dev/shm/s', 'w')")
        assert await value(box, "'localhost' in open('/etc/hosts').read()")
        await box.ok("for n in os.listdir('/dev/pts'):\n    assert n in ('ptmx',), n")
        ran = await box.run("open('/proc/sysrq-trigger', 'w').write('h')")
        assert ran.outcome is Outcome.ERROR, ran.said()
    assert bait() == before


def _whiteout(path: str) -> str:
    folder, name = os.path.split(path)
    return f"{folder}/.wh.{name}" if folder else f".wh.{name}"


@pytest.mark.escape
@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ([("etc/passwd", "fifo", None)], "/etc/passwd of the image is not a regular file"),
        ([("etc/passwd", "file", b"x" * (17 * MIB))], "/etc/passwd of the image has more than"),
        ([("etc/group", "folder", None)], "/etc/group of the image is not a regular file"),
    ],
)  # fmt: skip
def test_tables_that_are_no_tables_are_refused(
    shelf: Shelf, entries: list[Entry], words: str
) -> None:
    clean = shelf.on_top(shelf.debian("bookworm"), (_whiteout(entries[0][0]), "file", ""))
    with pytest.raises(ImageError, match=words):
        shelf.plan(shelf.on_top(clean, *entries, user="games"))


@pytest.mark.escape
async def test_a_table_that_is_a_link_is_read_inside_of_the_image(
    shelf: Shelf, tmp_path: Path
) -> None:
    row = "x:x:77:77::/:/bin/sh\n"
    secret = tmp_path / "secret"
    secret.write_text("host:x:42:42::/:/bin/sh\n")
    clean = shelf.on_top(shelf.debian("bookworm"), ("etc/.wh.passwd", "file", ""))
    image = shelf.on_top(
        clean, ("etc/passwd", "link", str(secret)),
        (str(secret).lstrip("/"), "file", row), user="x",
    )  # fmt: skip
    (tmp_path / "w").mkdir()
    async with session(shelf.plan(image), tmp_path / "w") as box:
        assert await value(box, "__import__('os').getuid()") == 77
        assert "host" not in await value(box, "open('/etc/passwd').read()")


# ---- images whose Python is of no use


def says(answer: str) -> str:
    return f"#!/bin/sh\n{answer}\n"


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (says("exit 3"), "does not run: /usr/local/bin/python3: it exits with 3"),
        (says("echo no libc here >&2; exit 1"), "does not run: /usr/local/bin/python3: no libc here"),
        (says("kill -SEGV $$"), "does not run: /usr/local/bin/python3: signal 11 ended it"),
        (says("echo hello"), "is not JSON"),
        (says('echo "{\\"version\\": \\"2.7.18\\"}"'), "is 2.7.18, too old"),
        ("\x7fELF of nothing", "does not start"),
    ],
)  # fmt: skip
def test_a_broken_python_is_named(shelf: Shelf, script: str, words: str) -> None:
    image = shelf.on_top(shelf.debian("bookworm"), ("usr/local/bin/python3", "program", script))
    with pytest.raises(ImageError) as caught:
        shelf.plan(image, "corp/base")
    assert words in caught.value.message
    assert "'corp/base'" in caught.value.message
    assert caught.value.hint


def test_an_image_without_a_python(shelf: Shelf) -> None:
    image = shelf.on_top(None, ("etc/passwd", "file", "root:x:0:0::/root:/bin/sh\n"))
    with pytest.raises(ImageError, match=r"image 'corp/base' has no Python") as caught:
        shelf.plan(image, "corp/base")
    assert "3.9 or newer" in caught.value.hint


def test_a_python_that_lacks_a_module_is_named(shelf: Shelf) -> None:
    module = "usr/lib/python3.11/lib-dynload/.wh._ctypes.cpython-311-x86_64-linux-gnu.so"
    machine = os.uname().machine
    image = shelf.on_top(shelf.debian("bookworm"), (module.replace("x86_64", machine), "file", ""))
    with pytest.raises(ImageError, match=r"lacks what cells need, ctypes: No module named '_ctyp"):
        shelf.plan(image)


def test_a_library_that_the_agent_needs_is_named(shelf: Shelf) -> None:
    folder = f"usr/lib/{os.uname().machine}-linux-gnu"
    image = shelf.on_top(shelf.debian("bookworm"), (f"{folder}/.wh.libstdc++.so.6", "file", ""))
    with pytest.raises(ImageError, match=r"lacks what cells need, libstdc\+\+.so.6") as caught:
        shelf.plan(image)
    assert "Debian: libstdc++6" in caught.value.hint


def test_a_package_of_the_image_that_does_not_fit_is_named(shelf: Shelf) -> None:
    image = shelf.on_top(
        shelf.debian("bookworm"),
        (
            "usr/lib/python3/dist-packages/traitlets-4.3.3.dist-info/METADATA", "file",
            "Metadata-Version: 2.1\nName: traitlets\nVersion: 4.3.3\n",
        ),
    )  # fmt: skip
    with pytest.raises(ImageError, match=r"needs traitlets>=5\S*, and there is traitlets 4.3.3"):
        shelf.plan(image)


def test_an_agent_is_shared_by_images_on_one_base(shelf: Shelf) -> None:
    base = shelf.debian("bullseye")
    one, two = (shelf.plan(shelf.on_top(base, ("note", "file", text))) for text in "ab")
    assert one.binds == two.binds
    assert one.layers != two.layers


async def test_two_sessions_ask_for_one_agent_at_once(shelf: Shelf, tmp_path: Path) -> None:
    with Store.open(tmp_path) as store:
        other = Shelf(store)
        image = other.debian("bookworm")
        made = await asyncio.gather(*(asyncio.to_thread(other.plan, image) for _ in range(2)))
        assert made[0] == made[1]
        assert len(store.records.all()) == 2  # what the Python says, and its agent


@pytest.mark.asyncio(loop_scope="module")
async def test_what_keeps_the_guest_from_starting_is_told(shelf: Shelf, tmp_path: Path) -> None:
    image = replace(shelf.plan(shelf.debian("bookworm")), binds=(), packages=())
    cause = "start the guest: ModuleNotFoundError: No module named 'ipykernel'"
    with pytest.raises(LaunchError, match=cause):
        async with session(image, tmp_path):
            pass
