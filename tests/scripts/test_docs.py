"""The pages of the site that are made: the command line's reference, links, lists of arguments."""

from types import SimpleNamespace

import pytest

pytest.importorskip("mkdocs")
pytest.importorskip("griffe")
import docs_hooks  # noqa: E402
from docs_docstrings import as_list  # noqa: E402

from qmoe.cli.options import build_parser  # noqa: E402


def test_the_reference_has_every_option_that_the_help_shows():
    page = docs_hooks.command_line()
    parser = build_parser()
    commands = next(a.choices for a in parser._actions if isinstance(a.choices, dict))
    for name, sub in commands.items():
        part = page.partition(f"\n## qmoe {name}\n")[2].partition("\n## ")[0]
        shown = {word.strip(",") for word in sub.format_help().split() if word.startswith("--")}
        own = {option for a in sub._actions for option in a.option_strings}
        assert shown & own and all(f"{option}" in part for option in shown & own), name
    assert "--windows" not in page  # a former name


@pytest.mark.parametrize(
    "page, link, moved",
    [
        ("index.md", "docs/run.md#on-a-cpu", "run.md#on-a-cpu"),
        ("index.md", "ARCHITECTURE.md", "ARCHITECTURE.md"),
        ("ARCHITECTURE.md", "docs/architecture", "ARCHITECTURE.md"),
        ("quantize.md", "../README.md#how-good", "index.md#how-good"),
        ("quantize.md", "quality/README.md", "quality/README.md"),
        ("gpu/README.md", "../architecture/kernels.md", "../architecture/kernels.md"),
    ],
)
def test_links(page, link, moved):
    place = SimpleNamespace(file=SimpleNamespace(src_uri=page))
    assert docs_hooks.on_page_markdown(f"a [b]({link}) c", page=place) == f"a [b]({moved}) c"


def test_arguments_become_a_list():
    assert as_list("Do it.\n\nsrc: a folder,\n    or a name.\ndst: new.\n\nReturns x: y.") == (
        "Do it.\n\n- **src**: a folder,\n    or a name.\n- **dst**: new.\n\nReturns x: y."
    )
