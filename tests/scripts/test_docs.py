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


def test_all_rows_of_a_file_are_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(docs_hooks, "ROWS", {"a.csv": ("A", "x.md"), "b.json": ("B", "y.md")})
    (tmp_path / "a.csv").write_text("name,kl,notes\nq|4,0.00123456,long\nq3,,\n")
    (tmp_path / "b.json").write_text('{"rows": [{"us": 35.2319, "tokens": 4096}]}')
    page = docs_hooks.rows(tmp_path)
    assert "| name | kl |\n|---|---|\n| q\\|4 | 0.001235 |\n| q3 |  |\n" in page
    assert "| us | tokens |\n|---|---|\n| 35.23 | 4096 |\n" in page and "long" not in page


def test_files_of_rows_are_there():
    assert all((docs_hooks.ROOT / "docs" / name).is_file() for name in docs_hooks.ROWS)
