import pytest
import typer

from cag.cli.quantities import codec_choice, duration_s, duration_text, size_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("1000", 1000),
        ("20GB", 20 * 10**9),
        ("1.5 kB", 1500),
        ("2MiB", 2 << 20),
        ("3g", 3 * 10**9),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text, expected):
    assert size_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("90s", 90), ("30m", 1800), ("12 h", 43_200), ("7d", 604_800), ("2w", 1_209_600)]
)
def test_durations(text, expected):
    assert duration_s(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1 apple", "1iB", "1e9", "٣GB"])
def test_what_is_not_a_size(text):
    with pytest.raises(typer.BadParameter, match="20GB"):
        size_bytes(text)


@pytest.mark.parametrize("text", ["", "7", "-1d", "7 days"])
def test_what_is_not_a_duration(text):
    with pytest.raises(typer.BadParameter, match="7d"):
        duration_s(text)


@pytest.mark.parametrize("text", ["0d", "0s", "0.0h", "9999999999w"])
def test_a_duration_that_is_none_or_too_long_says_how_long_it_may_be(text):
    with pytest.raises(typer.BadParameter, match="more than 0s and at most a hundred years"):
        duration_s(text)


def test_a_codec_is_an_id_or_a_configuration():
    assert codec_choice("int8") == "int8"
    assert codec_choice(' {"id": "int4", "wide_key_layers": [7]}') == {"id": "int4", "wide_key_layers": [7]}


@pytest.mark.parametrize("text", ["{", "{'id': 'int8'}", '{"id": "int8"} more', '{"a":' * 100_000])
def test_what_is_not_a_codec(text):
    with pytest.raises(typer.BadParameter, match="nor JSON"):
        codec_choice(text)


def test_durations_are_said_in_their_largest_unit():
    said = [duration_text(seconds) for seconds in (1, 119, 120, 7200, 172_800)]
    assert said == ["1 s", "119 s", "2 m", "2 h", "2 d"]
