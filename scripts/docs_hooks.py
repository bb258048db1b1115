"""Pages of the site that are not in docs/: the README, ARCHITECTURE.md and their like, and the
reference of the command line, which is made of the parser itself, and all rows that measurements
left as CSV and JSON. mkdocs loads this file.

Left out: the pages themselves, which mkdocs.yml lists.
"""

import argparse
import csv
import json
import re
import sys
import textwrap
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
TOP = {
    "README.md": "index.md",
    **{f"{name}.md": f"{name}.md" for name in ("ARCHITECTURE", "CHANGELOG", "CONTRIBUTING")},
}
# Links to folders, which a site has no page for.
FOLDERS = {"docs/architecture": "ARCHITECTURE.md", "NVIDIA_H100_80GB_HBM3/": None}
LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")
PYTHON = """\
# Python

```python
import qmoe
```

::: qmoe.pipeline.quantize.quantize
    options: { heading: qmoe.quantize }

::: qmoe.packed.load.load
    options: { heading: qmoe.load }

::: qmoe.html_report.report.report
    options: { heading: qmoe.report }

::: qmoe.config.quant.QuantConfig
    options: { heading: qmoe.QuantConfig, members: [preset, from_dict, to_dict] }

::: qmoe.config.quant.CalibrationConfig
    options: { heading: qmoe.CalibrationConfig, members: [] }

::: qmoe.config.scheme.Scheme
    options: { heading: qmoe.Scheme, members: [] }

::: qmoe.errors
    options: { heading: Errors, filters: ["!^_"] }
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    pages = {site: (ROOT / name).read_text(encoding="utf-8") for name, site in TOP.items()}
    pages |= {"reference/cli.md": command_line(), "reference/python.md": PYTHON}
    pages["reference/rows.md"] = rows(ROOT / "docs")
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    """Links as they are in the repository, made to work in the site."""
    depth = page.file.src_uri.count("/")

    def moved(link: re.Match[str]) -> str:
        target, anchor = link[1], link[2] or ""
        if target in FOLDERS:
            target = FOLDERS[target] or f"{target}kernels.json"
        elif page.file.src_uri in TOP.values():
            target = TOP.get(target, target.removeprefix("docs/"))
        else:
            up, _, name = target.rpartition("../")
            if up.count("..") == depth and target.startswith("../") and name in TOP:
                target = "../" * depth + TOP[name]
        return f"]({target}{anchor})"

    return LINK.sub(moved, markdown)


def command_line() -> str:
    """The reference of all commands, in Markdown."""
    sys.path.append(str(ROOT / "scripts"))  # last: a folder named kernels must not come first
    from qmoe.cli.options import build_parser

    parser = build_parser()
    (commands,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines = ["# Command line", "", str(parser.description), "", *_options(parser)]
    for choice in commands._choices_actions:
        sub = commands.choices[choice.dest]
        usage = re.sub(r"\s+", " ", sub.format_usage()).strip().removeprefix("usage: ")
        usage = textwrap.fill(usage, 76, subsequent_indent="    ", break_long_words=False)
        lines += ["", f"## qmoe {choice.dest}", "", sub.description or f"{choice.help}.", ""]
        lines += ["```text", usage, "```", "", *_options(sub)]
        if sub.epilog:
            lines += ["", "```text", sub.epilog.rstrip(), "```"]
    return "\n".join(lines) + "\n"


# Files of rows below docs/, what they hold, and the page that explains them.
ROWS = {
    "quality/quality.csv": ("Quality beside other tools", "../quality/README.md"),
    "budget/tiny-qwen3moe.csv": ("Bits chosen for a number of bytes", "../budget.md"),
    "gguf/gguf.csv": ("Files of llama.cpp", "../gguf.md"),
    "gpu/NVIDIA_H100_80GB_HBM3/decode.json": (
        "MoE layers on an H100, decoding",
        "../gpu/README.md",
    ),
    "gpu/NVIDIA_H100_80GB_HBM3/prefill.json": (
        "MoE layers on an H100, prompts",
        "../gpu/README.md",
    ),
}
LONG = ("versions", "notes", "types")  # columns that stay in the file


def rows(docs: Path) -> str:
    """A page of every row that benchmarks wrote into the repository."""
    said = (
        "The tables are made of files in the repository, which benchmarks wrote. The page that is "
        "named explains the columns and has the command."
    )
    lines = ["# All measured rows", "", said]
    for name, (title, page) in ROWS.items():
        text = (docs / name).read_text(encoding="utf-8")
        found = (
            json.loads(text)["rows"]
            if name.endswith("json")
            else [*csv.DictReader(text.splitlines())]
        )
        heads = [head for head in found[0] if head not in LONG]
        lines += [
            "",
            f"## {title}",
            "",
            f"From `docs/{name}`, explained on [this page]({page}).",
            "",
        ]
        lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        lines += [f"| {' | '.join(_short(row.get(head)) for head in heads)} |" for row in found]
    return "\n".join(lines) + "\n"


def _short(value: object) -> str:
    """Numbers with a point as four digits that count, all else as it is."""
    text = "" if value is None else str(value)
    try:
        return f"{float(text):.4g}" if "." in text else text.replace("|", "\\|")
    except ValueError:
        return text.replace("|", "\\|")


def _options(parser: argparse.ArgumentParser) -> list[str]:
    """A table of the options and arguments that the help shows."""
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._SubParsersAction):
            continue
        name = ", ".join(action.option_strings) or action.dest
        value = action.metavar or (
            "/".join(map(str, action.choices)) if action.choices else
            action.dest.upper() if action.nargs != 0 and action.option_strings else ""
        )  # fmt: skip
        default = action.default
        shown = "" if default in (None, False, [], argparse.SUPPRESS) else f" Default: {default}."
        text = (action.help or "").replace("%(default)s", str(default))
        text = re.sub(r"([|\[\]*<])", r"\\\1", text)
        rows.append(f"| `{f'{name} {value}'.strip()}` | {text}.{shown} |")
    return ["| option | meaning |", "|---|---|", *rows]
