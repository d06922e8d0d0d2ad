"""From words to frozen limits: traits, the %%sandbox line, the %sandbox verb."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from traitlets.config import Application, Config

from sandbox_kernel.config import (
    BY_NAME,
    LIMITS,
    WAIVABLE,
    SandboxConfig,
    arguments_of,
    freeze,
    is_status_line,
    limits_markdown,
    limits_of,
    parse_cell,
)
from sandbox_kernel.errors import ConfigError
from sandbox_kernel.model import Limits

MIB = 1 << 20
CEILING = limits_of(SandboxConfig())


def test_the_defaults() -> None:
    assert (
        Limits(
            memory_bytes=1024 * MIB,
            cpus=2.0,
            cpu_time_s=300,
            wall_time_s=300,
            processes=128,
            disk_bytes=512 * MIB,
            output_bytes=10 * MIB,
            open_files=1024,
            io_bytes_per_s=None,
        )
        == CEILING
    )
    settings = freeze(SandboxConfig())
    assert (settings.image, settings.workspace_mode, settings.grace_s) == ("host", "overlay", 2.0)
    assert settings.waived == frozenset()


def test_the_table_is_complete() -> None:
    assert {limit.field for limit in LIMITS} == {f.name for f in dataclasses.fields(Limits)}
    traits = SandboxConfig.class_own_traits(config=True)
    for limit in LIMITS:
        assert traits[limit.name].default_value == limit.default
        assert traits[limit.name].help == limit.help
        default = limit.parse(limit.default)
        assert default is None if limit.default == "none" else default >= limit.minimum
        assert f"`{limit.name}`" in limits_markdown()


def test_arguments_reach_the_traits() -> None:
    class App(Application):
        classes = [SandboxConfig]

    app = App()
    app.parse_command_line(
        [
            "--SandboxConfig.memory=256M",
            "--SandboxConfig.cpus=0.5",
            "--SandboxConfig.processes=7",
            "--SandboxConfig.waive=cpus",
            "--SandboxConfig.waive=processes",
        ]
    )
    settings = freeze(SandboxConfig(parent=app))
    assert settings.limits.memory_bytes == 256 * MIB
    assert settings.limits.cpus == 0.5
    assert settings.limits.processes == 7
    assert settings.waived == {"cpus", "processes"}


def test_a_configuration_file_may_write_numbers() -> None:
    config = Config({"SandboxConfig": {"cpus": 1, "memory": 64 * MIB, "wall_time": 1.5}})
    limits = limits_of(SandboxConfig(config=config))
    assert (limits.cpus, limits.memory_bytes, limits.wall_time_s) == (1.0, 64 * MIB, 1.5)


def test_arguments_name_only_what_differs() -> None:
    assert arguments_of(SandboxConfig()) == []
    config = SandboxConfig(memory="512M", cpus=2.0, waive=["cpus", "processes"], workspace="ro")
    assert arguments_of(config) == [
        "--SandboxConfig.memory=512M",
        "--SandboxConfig.waive=cpus",
        "--SandboxConfig.waive=processes",
        "--SandboxConfig.workspace=ro",
    ]


@pytest.mark.parametrize("name", list(BY_NAME))
@pytest.mark.parametrize(
    "value", ["0", "-1", "", "many", "1e9", "inf", "nan", 0, -1, math.nan, True]
)
def test_a_bad_limit_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        BY_NAME[name].parse(value)  # type: ignore[arg-type]
    assert caught.value.message.startswith(name)
    assert str(value) in caught.value.message
    assert caught.value.hint


def test_a_forgotten_unit_is_noticed() -> None:
    with pytest.raises(ConfigError, match="did you mean memory=512M"):
        BY_NAME["memory"].parse("512")


@pytest.mark.parametrize("text", ["50M", "50M/s", "50 MiB/s", " 50m ", 50 * MIB])
def test_a_rate(text: str | int) -> None:
    limit = BY_NAME["io"]
    number = limit.parse(text)
    assert number == 50 * MIB
    assert limit.format(number) == "50 MiB/s"


def test_only_io_may_be_without_a_limit() -> None:
    assert limits_of(SandboxConfig(io="none")).io_bytes_per_s is None
    assert BY_NAME["io"].format(None) == "none"
    for name in BY_NAME.keys() - {"io"}:
        with pytest.raises(ConfigError, match=f"{name}: 'none' is not a"):
            BY_NAME[name].parse("none")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("64K", ["io=64K", "too small", "1 MiB/s"]),
        ("50", ["io=50", "did you mean io=50M"]),
        ("50M/min", ["io", "50M/min", "not a size"]),
        ("None", ["io", "None"]),
    ],
)
def test_a_bad_rate_is_named(value: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze(SandboxConfig(io=value))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_cell_lowers_and_raises_io() -> None:
    settings = freeze(SandboxConfig(io="50M", ceiling=["io=100M"]))
    for text, number in (("io=1M", 1), ("io=100M", 100)):
        limits, _ = parse_cell(f"%%sandbox {text}\nx", settings.limits, settings.ceiling)
        assert limits.io_bytes_per_s == number * MIB
    for text in ("io=101M", "io=none"):
        with pytest.raises(ConfigError, match=f"{text} is above the ceiling of 100 MiB/s"):
            parse_cell(f"%%sandbox {text}\nx", settings.limits, settings.ceiling)


def test_a_cell_cannot_limit_what_its_kernel_does_not() -> None:
    with pytest.raises(ConfigError, match=r"io=10M cannot be set.*install --io 10M"):
        parse_cell("%%sandbox io=10M\nx", CEILING, CEILING)
    assert parse_cell("%%sandbox io=none\nx", CEILING, CEILING)[0] == CEILING


@pytest.mark.parametrize("name", ["processes", "open_files"])
def test_counts_are_whole(name: str) -> None:
    with pytest.raises(ConfigError, match="whole number"):
        BY_NAME[name].parse("128.5")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workspace": "overlai"}, ["overlai", "did you mean overlay", "rw", "none"]),
        ({"waive": ["memori"]}, ["memori", "did you mean memory"]),
        ({"waive": ["everything"]}, ["everything", *WAIVABLE]),
        ({"grace": "soon"}, ["grace", "soon", "500ms"]),
        ({"image": " "}, ["image"]),
        ({"disk": "0"}, ["disk=0"]),
    ],
)
def test_a_bad_setting_is_named(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze(SandboxConfig(**settings))
    assert all(word in str(caught.value) for word in words)


def test_a_cell_without_the_line_has_the_ceiling() -> None:
    for code in ("", "\n\n", "x = 1", "%%time\nx", "%sandbox", "%%sandboxes a=1", "# %%sandbox"):
        assert parse_cell(code, CEILING, CEILING) == (CEILING, code)


def test_a_cell_lowers_limits() -> None:
    limits, code = parse_cell("%%sandbox memory=256M wall_time='5 s' cpus=0.5\nx", CEILING, CEILING)
    assert limits == dataclasses.replace(CEILING, memory_bytes=256 * MIB, wall_time_s=5, cpus=0.5)
    assert code.endswith("\nx")


def test_a_cell_may_ask_for_the_ceiling_itself() -> None:
    limits, _ = parse_cell("%%sandbox memory=1G", CEILING, CEILING)
    assert limits == CEILING


def test_line_numbers_stay() -> None:
    _, code = parse_cell("%%sandbox memory=1G  # all\nx = 1\n1/0\n", CEILING, CEILING)
    assert code.splitlines()[1:] == ["x = 1", "1/0"]
    assert code.startswith("#")
    with pytest.raises(ZeroDivisionError) as caught:
        exec(compile(code, "cell", "exec"), {})
    assert caught.traceback[-1].lineno + 1 == 3


def test_blank_lines_before_it() -> None:
    _, code = parse_cell("\n  \n%%sandbox memory=1G\nx = 1\n", CEILING, CEILING)
    assert code.splitlines()[3] == "x = 1"


def test_a_cell_magic_may_follow() -> None:
    _, code = parse_cell("%%sandbox memory=1G\n\n%%time\nx = 1\n", CEILING, CEILING)
    assert code == "%%time\nx = 1\n"


def test_settings_without_code() -> None:
    assert parse_cell("%%sandbox memory=1G\n  \n", CEILING, CEILING)[1] == ""
    assert parse_cell("%%sandbox\nx", CEILING, CEILING)[0] == CEILING


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("memory=2G", ["memory=2G", "1 GiB", "kernelspec", "--ceiling memory=2G"]),
        ("wall_time=1h", ["wall_time=1h", "5 min", "--ceiling wall_time=1h"]),
        ("cpus=64", ["cpus=64", "ceiling of 2"]),
        ("memory=0", ["memory=0", "16 MiB"]),
        ("memory=lots", ["memory", "lots", "512M"]),
        ("memory=", ["memory", "''"]),
        ("memry=1G", ["memry", "did you mean memory"]),
        ("colour=red", ["colour", "open_files"]),
        ("memory", ["'memory'", "name=value"]),
        ("memory = 1G", ["'memory'", "name=value"]),
        ("=1G", ["=1G", "name=value"]),
        ("memory=1M memory=1G", ["memory"]),
        ("memory=64M memory=64M", ["memory", "twice"]),
        ("memory='64M", ["memory='64M", "quotation"]),
        ("image=debian", ["image", "install --image"]),
        ("waive=cpus", ["waive", "belongs to the kernel"]),
    ],
)
def test_a_bad_line_is_named(line: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_cell(f"%%sandbox {line}\nx = 1", CEILING, CEILING)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_two_lines_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="two"):
        parse_cell("%%sandbox memory=64M\n%%sandbox cpus=1\nx", CEILING, CEILING)


@pytest.mark.parametrize("code", ["%sandbox", "\n %sandbox \n", "%sandbox  # how much is left?"])
def test_the_status_line(code: str) -> None:
    assert is_status_line(code)


@pytest.mark.parametrize("code", ["", "x", "%sandboxes", "%%sandbox memory=1G", "x\n%sandbox", "%"])
def test_no_status_line(code: str) -> None:
    assert not is_status_line(code)


@pytest.mark.parametrize(
    ("code", "words"),
    [("%sandbox foo", ["'foo'", "%%sandbox"]), ("%sandbox\nx = 1", ["alone"])],
)
def test_a_bad_status_line_is_named(code: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        is_status_line(code)
    assert all(word in str(caught.value) for word in words)


@given(st.text())
def test_no_code_breaks_the_parsers(code: str) -> None:
    for text in (code, "%%sandbox " + code, "%sandbox " + code):
        try:
            limits, rest = parse_cell(text, CEILING, CEILING)
            is_status_line(text)
        except ConfigError as error:
            assert error.hint
        else:
            assert isinstance(rest, str)
            assert all(
                value == ceiling or value < ceiling
                for value, ceiling in zip(
                    dataclasses.astuple(limits), dataclasses.astuple(CEILING), strict=True
                )
            )


def test_a_cell_may_raise_a_limit_up_to_the_ceiling() -> None:
    settings = freeze(SandboxConfig(memory="256M", ceiling=["memory=1G", "wall_time=1h"]))
    assert settings.limits.memory_bytes == 256 << 20
    assert settings.ceiling.memory_bytes == 1 << 30
    assert settings.ceiling.processes == settings.limits.processes
    limits, _ = parse_cell("%%sandbox memory=1G\nx", settings.limits, settings.ceiling)
    assert limits.memory_bytes == 1 << 30
    assert limits.wall_time_s == settings.limits.wall_time_s
    with pytest.raises(ConfigError, match="memory=2G is above the ceiling of 1 GiB"):
        parse_cell("%%sandbox memory=2G\nx", settings.limits, settings.ceiling)


@pytest.mark.parametrize(
    ("ceiling", "words"),
    [
        ("memory", "ceiling 'memory' has no value"),
        ("memori=1G", "did you mean memory"),
        ("memory=1M", "memory=1M is too small"),
        ("memory=512M", "is below the limit of 1 GiB"),
        ("io=100M", "set the limit too: --io 100M"),
        ("io=none", "io=none is no bound"),
    ],
)
def test_a_bad_ceiling_is_named(ceiling: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze(SandboxConfig(ceiling=[ceiling]))
    assert words in str(caught.value)
