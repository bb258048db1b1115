import pytest

from qmoe.errors import ConfigError
from qmoe.system.sizes import format_size, parse_size


@pytest.mark.parametrize(
    "text, count",
    [
        ("12GB", 12 * 10**9),
        ("12GiB", 12 * 2**30),
        ("12 gib", 12 * 2**30),
        ("1.5 GB", 1_500_000_000),
        ("500MB", 500_000_000),
        ("500MiB", 500 * 2**20),
        ("3kB", 3000),
        ("3KiB", 3072),
        ("2TB", 2 * 10**12),
        (" 7B ", 7),
        ("12000000000", 12 * 10**9),
        (12, 12),
        (0, 0),
    ],
)
def test_a_size_is_read(text, count):
    assert parse_size("max_memory", text) == count


@pytest.mark.parametrize("text", ["", "GB", "12XB", "12 G", "-1GB", "1e9", "1.5", "12GB 3", "１GB"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="max_memory: expected a size such as 12GB"):
        parse_size("max_memory", text)


def test_a_number_alone_is_asked_about():
    """It was GB on the command line once."""
    with pytest.raises(ConfigError, match="12 has no unit; write 12GB for .* or 12B for"):
        parse_size("max_memory", "12")


def test_other_types_are_refused():
    # In plain Python a caller's mistake gets here; the tests' type checker would refuse it first.
    plain = getattr(parse_size, "__wrapped__", parse_size)
    for value in (True, 6.5, None, [1]):
        with pytest.raises((ConfigError, TypeError)):
            plain("max_memory", value)


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (3.82e9, "3.82 GB"), (5e12, "5.00 TB")],
)
def test_a_size_is_printed(count, text):
    assert format_size(count) == text
