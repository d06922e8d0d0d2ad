"""The agent without containers: what an image's Python says, what fits together, what goes in."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel.build import agent, agent_download, agent_local
from sandbox_kernel.build.agent import check_fit, prepare_agent
from sandbox_kernel.build.agent_bytecode import Compiler, compile_here, read_bytecode
from sandbox_kernel.build.agent_files import (
    is_wanted,
    merged,
    packages_in,
    read_wheel,
    write_files,
)
from sandbox_kernel.build.agent_packages import Installed, closure, markers
from sandbox_kernel.build.agent_platform import platforms
from sandbox_kernel.build.python_facts import (
    LIBRARY,
    MODULES,
    SCRIPT,
    PythonFacts,
    ask_python,
    own_facts,
    parse_facts,
)
from sandbox_kernel.errors import ImageError
from sandbox_kernel.image.store import Store
from sandbox_kernel.model import Bind

OLD = PythonFacts((3, 9), "x86_64", "glibc", (2, 31))


def run_here(argv: Sequence[str]) -> bytes:
    return subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.PIPE).stdout


def answer(**changes: Any) -> bytes:
    """Give what a good Python answers, with changes."""
    good = {
        "implementation": "cpython",
        "version": "3.11.2",
        "prefix": "/usr",
        "machine": own_facts().machine,
        "is_64_bit": True,
        "has_gil": True,
        "libc": ["glibc", "2.36"],
        "lacks": {},
        "packages": [],
    }
    return json.dumps({**good, **changes}).encode()


# ---- facts


def test_the_script_says_of_this_python_what_we_know_of_it() -> None:
    facts = ask_python("here", run_here)
    own = own_facts()
    assert (facts.version, facts.machine, facts.prefix) == (own.version, own.machine, own.prefix)
    assert (facts.libc, facts.libc_version) == (own.libc, own.libc_version)
    known = {package.name: package for package in facts.packages}
    assert known["ipykernel"].version == version("ipykernel")
    assert any(line.startswith("traitlets") for line in known["ipykernel"].requires)


def test_a_module_that_does_not_load_is_named() -> None:
    said = run_here(["-c", SCRIPT, "json,no_such_module", "", LIBRARY])
    with pytest.raises(ImageError, match=r"lacks what cells need, no_such_module: No module named"):
        parse_facts("x", said)


def test_what_an_image_prints_before_the_answer_is_passed_over() -> None:
    assert parse_facts("x", b"welcome!\n{}\n" + answer() + b"\n").version == (3, 11)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "3.8.20"}, "is 3.8.20, too old: cells need 3.9 or newer"),
        ({"version": "2.7.18"}, "is 2.7.18, too old"),
        ({"implementation": "pypy"}, "is pypy, not CPython"),
        ({"is_64_bit": False}, "is a 32-bit build"),
        ({"has_gil": False}, "is a free-threaded build"),
        ({"machine": "s390x"}, "is for 's390x'"),
        ({"libc": ["", ""]}, "neither glibc nor musl"),
        ({"lacks": {"ctypes": "No module named '_ctypes'"}}, "ctypes: No module named '_ctypes'"),
    ],
)  # fmt: skip
def test_a_python_of_no_use_is_named_with_the_remedy(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ImageError) as caught:
        parse_facts("corp/base", answer(**changes))
    assert words in caught.value.message
    assert "'corp/base'" in caught.value.message
    assert "python:3-slim" in caught.value.hint


def test_a_library_that_is_missing_has_a_remedy_of_its_own() -> None:
    said = run_here(["-c", SCRIPT, "json", "", "libnowhere.so.1"])
    with pytest.raises(ImageError, match=r"libnowhere.so.1: libnowhere.so.1: cannot open shared"):
        parse_facts("x", said)
    with pytest.raises(ImageError) as caught:
        parse_facts("x", answer(lacks={LIBRARY: "cannot open"}))
    assert caught.value.hint == f"install {LIBRARY} in it (Debian: libstdc++6)"


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"", "is not JSON"),
        (b"Segmentation fault", "is not JSON"),
        (b"[1]", "is not a JSON object"),
        (answer(version="3." + "9" * 500), "version is '3.999"),
        (answer(version="three"), "'three' is not a version"),
        (answer(version=3.11), "version is not a text"),
        (answer(machine=["x86_64"]), "machine is not a text"),
        (answer(libc=["glibc", "2.36; rm -rf /"]), "is not a version"),
        (answer(libc="glibc"), "libc is not a list"),
        (answer(lacks=["ctypes"]), "lacks is not an object"),
        (answer(packages=[{"name": "ipykernel", "version": "7\n--index-url=x"}]), "version is '7"),
        (answer(packages=[{"name": "ipykernel", "version": "7", "requires": [1]}]), "not a text"),
        (b'{"version": "3.11", "version": "3.12"}', "ambiguous"),
        (b" " * (2 << 20), "has more than 1048576 bytes"),
    ],
)  # fmt: skip
def test_a_hostile_answer_is_refused(said: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=r"what the Python of image 'x' says") as caught:
        parse_facts("x", said)
    assert words in caught.value.message


def test_packages_that_nobody_asked_for_do_not_count() -> None:
    many = ["a"] * 1000
    facts = parse_facts(
        "x",
        answer(
            packages=[
                {"name": "evil", "version": "1"},
                {"name": "comm", "version": "0.2", "requires": many},
                {"name": "ipykernel", "version": "6.30"},
            ]
        ),
    )
    assert [package.name for package in facts.packages] == ["ipykernel"]


def test_a_python_that_does_not_run_is_said_to_be_broken() -> None:
    def run(argv: Sequence[str]) -> bytes:
        assert ",".join(MODULES) in argv
        raise ImageError("/usr/bin/python3: Fatal Python error: init_fs_encoding")

    with pytest.raises(
        ImageError, match="Python of image 'x' does not run: /usr/bin/python3: Fata"
    ):
        ask_python("x", run)


# ---- wheels for a platform


def test_platform_tags() -> None:
    tags = platforms(OLD)
    assert tags[0] == "manylinux_2_31_x86_64"
    assert {"manylinux2014_x86_64", "manylinux1_x86_64", "manylinux_2_5_x86_64"} <= set(tags)
    assert not any("_2_32_" in tag or "_2_4_" in tag for tag in tags)
    arm = PythonFacts((3, 12), "aarch64", "glibc", (2, 17))
    assert platforms(arm) == ["manylinux_2_17_aarch64", "manylinux2014_aarch64"]
    alpine = PythonFacts((3, 12), "x86_64", "musl", (1, 2))
    assert platforms(alpine) == [f"musllinux_1_{one}_x86_64" for one in (2, 1, 0)]


@pytest.mark.parametrize(
    ("path", "wanted"),
    [
        ("IPython/core/shell.py", True),
        ("zmq/backend/_zmq.abi3.so", True),
        ("pyzmq.libs/libzmq.so.5", True),
        ("a-1.dist-info/METADATA", True),
        ("a-1.dist-info/licenses/LICENSE", True),
        ("a-1.dist-info/COPYING.txt", True),
        ("a-1.dist-info/RECORD", False),
        ("a-1.dist-info/direct_url.json", False),
        ("a-1.data/scripts/a", False),
        ("../../../bin/a", False),
        ("/etc/passwd", False),
        ("a/tests/test_a.py", False),
        ("test.py", True),
        ("a/__pycache__/b.cpython-311.pyc", False),
    ],
)  # fmt: skip
def test_what_of_a_package_is_wanted(path: str, wanted: bool) -> None:
    assert is_wanted(path) is wanted


def make_wheel(path: Path, files: dict[str, str], requires: Sequence[str] = ()) -> Path:
    name, release = path.name.split("-")[:2]
    lines = [f"Name: {name}", f"Version: {release}", *(f"Requires-Dist: {one}" for one in requires)]
    with zipfile.ZipFile(path, "w") as wheel:
        for place, text in files.items():
            wheel.writestr(place, text)
        wheel.writestr(f"{name}-{release}.dist-info/METADATA", "\n".join(lines) + "\n\nNot: read\n")
        wheel.writestr(f"{name}-{release}.dist-info/RECORD", "")
    return path


def test_a_wheel_is_read(tmp_path: Path) -> None:
    path = tmp_path / "My_Pkg-1.2-py3-none-any.whl"
    made = {"my/a.py": "1", "My_Pkg-1.2.data/purelib/b.py": "2", "My_Pkg-1.2.data/data/c": "3"}
    package, files = read_wheel(make_wheel(path, {**made, "../d.py": "4", "/e.py": "5"}, ["six"]))
    assert package == Installed("my-pkg", "1.2", ("six",))
    assert set(files) == {"my/a.py", "b.py", "My_Pkg-1.2.dist-info/METADATA"}


def test_what_is_no_wheel_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a-1-py3-none-any.whl"
    path.write_bytes(b"PK\x03\x04 not a zip")
    with pytest.raises(ImageError, match=r"the wheel a-1-py3-none-any.whl cannot be read"):
        read_wheel(path)


def test_two_packages_with_one_file_are_refused() -> None:
    with pytest.raises(ImageError, match=r"two packages of the agent have the file six.py"):
        merged([{"six.py": b"1"}, {"six.py": b"2"}])


# ---- resolution


def packages(*rows: str) -> dict[str, Installed]:
    """Give packages of rows like `name 1.0: requirement, requirement`."""
    found = {}
    for row in rows:
        head, _, requires = row.partition(":")
        name, release = head.split()
        lines = tuple(one.strip() for one in requires.split(",") if one.strip())
        found[name] = Installed(name, release, lines)
    return found


def test_markers_count_for_the_python_that_is_asked_for() -> None:
    there = packages("a 1: b; python_version < '3.10', c; extra == 'more'", "b 2:")
    found, unmet = closure(["a"], there, markers((3, 9), "x86_64"))
    assert (list(found), unmet) == (["a", "b"], [])
    assert list(closure(["a"], there, markers((3, 10), "x86_64"))[0]) == ["a"]


def test_what_is_not_met_is_named_with_who_needs_it() -> None:
    there = packages("a 1: b>=2, c", "b 1:")
    _, unmet = closure(["a"], there, markers((3, 9), "x86_64"))
    assert [(one.by, str(one.requirement), one.version) for one in unmet] == [
        ("a 1", "b>=2", "1"),
        ("a 1", "c", ""),
    ]


def test_the_debugger_is_left_out_and_unreadable_lines_are_passed_over() -> None:
    there = packages("a 1: debugpy>=1.6, ???, b", "b dfsg1:")
    found, unmet = closure(["a"], there, markers((3, 9), "x86_64"))
    assert (list(found), unmet) == (["a", "b"], [])


# ---- fit


def agent_of(folder: Path, *rows: str) -> Path:
    for package in packages(*rows).values():
        lines = [f"Name: {package.name}", f"Version: {package.version}"]
        lines += [f"Requires-Dist: {one}" for one in package.requires]
        text = "\n".join(lines) + "\n"
        write_files(folder, {f"{package.name}-1.dist-info/METADATA": text.encode()})
    return folder


ROWS = (
    "ipykernel 7.1: ipython>=7.23.1, jupyter-client>=8, traitlets>=5.4",
    "ipython 9.1: traitlets>=5.13",
    "jupyter-client 8.6: traitlets>=5.3",
    "traitlets 5.14:",
    "cloudpickle 3.1:",
)


def with_packages(*rows: str) -> PythonFacts:
    return PythonFacts(
        (3, 11), "x86_64", "glibc", (2, 36), packages=tuple(packages(*rows).values())
    )


@pytest.mark.parametrize(
    "rows", [(), ("traitlets 5.13:",), ("ipython 8.20: backcall, pickleshare",)]
)
def test_an_image_whose_packages_fit(tmp_path: Path, rows: tuple[str, ...]) -> None:
    check_fit("x", with_packages(*rows), agent_of(tmp_path, *ROWS))


@pytest.mark.parametrize(
    ("row", "words", "hint"),
    [
        (
            "ipykernel 5.4:",
            "the guest needs ipykernel<8,>=6.17, and there is ipykernel 5.4",
            "run pip install 'ipykernel<8,>=6.17' in the image, or remove ipykernel from it",
        ),
        (
            "traitlets 5.5:",
            "ipython 9.1 needs traitlets>=5.13, and there is traitlets 5.5",
            "run pip install 'traitlets>=5.13' in the image, or remove traitlets from it",
        ),
        (
            "ipython 8.5: traitlets>=6",
            "ipython 8.5 needs traitlets>=6, and there is traitlets 5.14",
            "run pip install 'traitlets>=6' in the image",
        ),
    ],
)  # fmt: skip
def test_packages_that_do_not_fit_are_named(
    tmp_path: Path, row: str, words: str, hint: str
) -> None:
    with pytest.raises(ImageError) as caught:
        check_fit("corp/base", with_packages(row), agent_of(tmp_path, *ROWS))
    assert caught.value.message == f"image 'corp/base' cannot run cells: {words}"
    assert caught.value.hint == hint


# ---- from here, and by pip


def test_what_is_installed_here_serves_a_python_like_ours() -> None:
    files = agent_local.installed_files(own_facts())
    assert files is not None
    tops = {name.split("/")[0] for name in files}
    assert {"ipykernel", "IPython", "cloudpickle", "traitlets", "zmq"} <= tops
    assert not tops & {"debugpy", "tzdata", "pytest", "sandbox_kernel", "..", "bin", "share"}


@pytest.mark.parametrize(
    "facts",
    [
        PythonFacts((3, 9), "x86_64", "glibc", (2, 36)),
        PythonFacts(own_facts().version, "mips", "glibc", (2, 36)),
        PythonFacts(own_facts().version, own_facts().machine, "musl", (1, 2)),
        # Wheels for manylinux of today do not run on a C library of ten years ago.
        PythonFacts(own_facts().version, own_facts().machine, "glibc", (2, 4)),
    ],
)  # fmt: skip
def test_what_is_installed_here_serves_no_other_python(facts: PythonFacts) -> None:
    assert agent_local.installed_files(facts) is None


def fake_pip(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, body: str) -> Path:
    """Have another program in the place of the Python that runs pip; it notes its arguments."""
    said = tmp_path / "arguments"
    program = tmp_path / "python"
    program.write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" >> {said}\n'
        "for one; do case $one in --dest=*) dest=${one#--dest=};; esac; done\n" + body
    )
    program.chmod(0o755)
    monkeypatch.setattr(agent_download.sys, "executable", str(program))
    return said


def test_markers_of_another_python_are_asked_for_in_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    make_wheel(index / "cloudpickle-3.1-py3-none-any.whl", {"cloudpickle.py": ""})
    make_wheel(
        index / "ipykernel-6.31-py3-none-any.whl",
        {"ipykernel.py": ""},
        ["zipp>=3; python_version < '3.10'", "appnope; platform_system == 'Darwin'"],
    )
    make_wheel(index / "zipp-3.2-py3-none-any.whl", {"zipp.py": ""})
    said = fake_pip(
        monkeypatch,
        tmp_path,
        f'cp {index}/[ci]* "$dest"; for one; do [ "$one" != "zipp>=3" ] || cp {index}/z* "$dest"; done\n'
        "echo Collecting ipykernel; echo more",
    )
    told: list[str] = []
    files = agent_download.downloaded_files(OLD, told.append)
    assert {"cloudpickle.py", "ipykernel.py", "zipp.py"} <= set(files)
    arguments = said.read_text().splitlines()
    assert {"download", "--python-version=3.9", "--platform=manylinux_2_31_x86_64"} <= set(
        arguments
    )
    assert told == ["Collecting ipykernel"] * 2


def test_what_pip_says_when_it_fails_is_passed_on_with_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_pip(monkeypatch, tmp_path, "echo 'ERROR: No matching distribution found'; exit 1")
    with pytest.raises(ImageError) as caught:
        agent_download.downloaded_files(OLD, lambda _: None)
    assert "Python 3.9 (glibc 2.31, x86_64) cannot be downloaded" in caught.value.message
    assert "ERROR: No matching distribution found" in caught.value.message
    assert "use an image with Python {}.{}".format(*own_facts().version) in caught.value.hint


# ---- bytecode


def sources(folder: Path) -> Path:
    write_files(
        folder, {"a.py": b"x = {1, 2, 'a'} | {3}\n", "p/b.py": b"y = 1\n", "p/bad.py": b"(\n"}
    )
    return folder


def test_bytecode_is_that_of_the_sources_and_always_the_same(tmp_path: Path) -> None:
    folder = sources(tmp_path)
    own = own_facts().version
    made = compile_here(folder, own)
    tag = "cpython-{}{}".format(*own)
    assert set(made) == {f"__pycache__/a.{tag}.pyc", f"p/__pycache__/b.{tag}.pyc"}
    assert made == compile_here(folder, own)
    assert struct.unpack_from("<I", made[f"__pycache__/a.{tag}.pyc"], 4) == (1,)  # unchecked
    write_files(folder, made)
    (folder / "a.py").write_text("raise SystemExit('compiled from source')\n")
    shown = run_here(
        ["-c", f"import sys; sys.path.insert(0, {str(folder)!r}); import a; print(a.x)"]
    )
    assert b"3" in shown


def frame(name: bytes, data: bytes) -> bytes:
    return struct.pack("!II", len(name), len(data)) + name + data


@pytest.mark.parametrize(
    "output",
    [
        frame(b"../evil.py", b"x"),
        frame(b"p/c.py", b"x"),
        frame(b"a.py", b"x")[:-1],
        frame(b"a.py", b"x") + b"\0",
        frame(b"\xff.py", b"x"),
        struct.pack("!II", 4, 1 << 31) + b"a.py",
    ],
)  # fmt: skip
def test_hostile_bytecode_is_refused(tmp_path: Path, output: bytes) -> None:
    with pytest.raises(ImageError, match="the bytecode of the agent"):
        read_bytecode(output, sources(tmp_path), (3, 9))


# ---- as a layer of the store


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[PythonFacts]:
    """Have an agent of two files in the place of what is downloaded; notes each download."""
    asked: list[PythonFacts] = []

    def files(facts: PythonFacts, _: Any = None) -> dict[str, bytes]:
        asked.append(facts)
        return {"a.py": b"x = 1\n", "p/b.py": b"y = 2\n"}

    monkeypatch.setattr(agent, "installed_files", lambda facts: None)
    monkeypatch.setattr(agent, "downloaded_files", files)
    return asked


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_an_agent_is_made_once_and_is_the_same_everywhere(
    tmp_path: Path, small: list[PythonFacts]
) -> None:
    facts = own_facts()
    with Store.open(tmp_path / "one") as store:
        first = prepare_agent(store, facts, lambda _: None)
        assert prepare_agent(store, facts, lambda _: None) == first
    with Store.open(tmp_path / "one") as store:
        assert prepare_agent(store, facts, lambda _: None) == first
    assert len(small) == 1
    tag = "cpython-{}{}".format(*facts.version)
    assert names(first) == {
        "a.py", "p/b.py", f"__pycache__/a.{tag}.pyc", f"p/__pycache__/b.{tag}.pyc",
    }  # fmt: skip
    with Store.open(tmp_path / "two") as store:
        assert prepare_agent(store, facts, lambda _: None).parent.name == first.parent.name


def test_the_agent_of_another_python_is_compiled_for_each_base(
    tmp_path: Path, small: list[PythonFacts]
) -> None:
    ran: list[tuple[Bind, ...]] = []

    def run(argv: Sequence[str], binds: tuple[Bind, ...]) -> bytes:
        ran.append(binds)
        return frame(b"a.py", b"bytecode")

    with Store.open(tmp_path) as store:
        plain = prepare_agent(store, OLD, lambda _: None)
        one, again, _ = (
            prepare_agent(store, OLD, lambda _: None, Compiler("sha256:" + digit * 64, run))
            for digit in "112"
        )
        assert names(plain) == {"a.py", "p/b.py"}
        assert names(one) == {"a.py", "p/b.py", "__pycache__/a.cpython-39.pyc"}
        assert one == again
        assert len(small) == 1
        assert len(ran) == 2  # what one image wrote is never shown to another
        assert [bind.source for bind in ran[0]] == [str(plain)]


def test_an_image_that_cannot_compile_has_its_agent_all_the_same(
    tmp_path: Path, small: list[PythonFacts]
) -> None:
    def run(argv: Sequence[str], binds: tuple[Bind, ...]) -> bytes:
        raise ImageError("/usr/bin/python3: it reached the limit of memory")

    told: list[str] = []
    with Store.open(tmp_path) as store:
        tree = prepare_agent(store, OLD, told.append, Compiler("sha256:" + "1" * 64, run))
        assert names(tree) == {"a.py", "p/b.py"}
    assert told[-1] == "Sessions will start later: /usr/bin/python3: it reached the limit of memory"


def test_the_packages_of_an_agent_are_read_from_its_metadata(tmp_path: Path) -> None:
    found = packages_in(agent_of(tmp_path, *ROWS))
    assert found["ipykernel"].version == "7.1"
    assert "jupyter-client>=8" in found["ipykernel"].requires
