"""Sizes and durations, there and back again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel.errors import ConfigError
from sandbox_kernel.units import (
    MAX_DURATION_S,
    MAX_SIZE_BYTES,
    SIZE_UNITS,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("256M", 256 * MIB),
        ("256m", 256 * MIB),
        ("256MB", 256 * MIB),
        ("256 MiB", 256 * MIB),
        ("1.5G", 1536 * MIB),
        (" 64KiB ", 64 * 1024),
        ("10k", 10 * 1024),
        ("7", 7),
        ("7b", 7),
        ("7B", 7),
        ("2t", 2 << 40),
        ("0", 0),
    ],
)
def test_a_size_is_read(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    ["", "M", "-1M", "1,5G", "1.G", "1X", "512 Mi", "1e3", "inf", "nan", "1 2", "٣M", "9" * 99],
)
def test_a_bad_size_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(text)
    assert repr(text) in caught.value.message
    assert "512M" in caught.value.hint


def test_an_endless_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="too large"):
        parse_size("9999999999999G")


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (MIB - 1, "1 MiB"),
        (512 * MIB, "512 MiB"),
        (1536 * MIB, "1.5 GiB"),
        (5 << 50, "5120 TiB"),
    ],
)
def test_a_size_is_written(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@given(st.integers(0, 1023), st.sampled_from("bkmgt"))
def test_whole_sizes_survive_the_round_trip(count: int, unit: str) -> None:
    size_bytes = parse_size(f"{count}{unit}")
    assert size_bytes == count * SIZE_UNITS[unit]
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.integers(0, MAX_SIZE_BYTES))
def test_any_size_survives_up_to_rounding(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes
    assert parse_size(format_size(size_bytes)) == pytest.approx(size_bytes, rel=0.06)


@given(st.text(max_size=12))
def test_no_text_breaks_the_parsers(text: str) -> None:
    for parse in (parse_size, parse_duration):
        try:
            assert parse(text) >= 0
        except ConfigError as error:
            assert error.hint


@pytest.mark.parametrize(
    ("text", "duration_s"),
    [
        ("5s", 5),
        ("2m", 120),
        ("2min", 120),
        ("1h", 3600),
        ("500ms", 0.5),
        ("1.5", 1.5),
        ("90", 90),
        ("1h30m", 5400),
        ("1 min 30 s", 90),
        ("1d", 86400),
        ("0s", 0),
    ],
)
def test_a_duration_is_read(text: str, duration_s: float) -> None:
    assert parse_duration(text) == pytest.approx(duration_s)


@pytest.mark.parametrize(
    "text", ["", "s", "-5s", "5 x", "5s5s", "30s1m", "1e3s", "inf", "nan", "5 5"]
)
def test_a_bad_duration_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_duration(text)
    assert repr(text) in caught.value.message
    assert "500ms" in caught.value.hint


def test_an_endless_duration_is_refused() -> None:
    with pytest.raises(ConfigError, match="too long"):
        parse_duration("99999d")


@pytest.mark.parametrize(
    ("duration_s", "text"),
    [
        (0, "0 ms"),
        (0.0023, "2.3 ms"),
        (0.25, "250 ms"),
        (1, "1 s"),
        (1.234, "1.23 s"),
        (59.96, "1 min"),
        (90, "1 min 30 s"),
        (300, "5 min"),
        (7200, "2 h"),
        (90061, "1 d 1 h 1 min 1 s"),
    ],
)
def test_a_duration_is_written(duration_s: float, text: str) -> None:
    assert format_duration(duration_s) == text


@given(st.integers(1, int(MAX_DURATION_S)))
def test_whole_seconds_survive_the_round_trip(duration_s: int) -> None:
    assert parse_duration(format_duration(duration_s)) == duration_s


@given(st.floats(0, MAX_DURATION_S))
def test_any_duration_survives_up_to_rounding(duration_s: float) -> None:
    again_s = parse_duration(format_duration(duration_s))
    assert again_s == pytest.approx(duration_s, rel=0.01, abs=0.0001)
