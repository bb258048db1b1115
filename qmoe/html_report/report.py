"""`report`: one page of HTML on a quantized folder, or on two side by side. It needs no network."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from qmoe.errors import OutputError
from qmoe.html_report import comparison
from qmoe.html_report.budget_section import budget
from qmoe.html_report.expert_sections import coverage, errors, quality, routing, use
from qmoe.html_report.facts import Facts, gather
from qmoe.html_report.plots import check_can_plot
from qmoe.html_report.prediction_section import prediction
from qmoe.html_report.section import Section
from qmoe.html_report.storage_sections import departures, memory, provenance, storage, summary
from qmoe.packed.card_text import source_name

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Report:
    """A whole page. A notebook shows it in a frame of its own."""

    html: str

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, and return its path. OutputError if that cannot be done."""
        place = Path(path).expanduser()
        try:
            place.write_text(self.html, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{place}: the report cannot be written: {error.strerror}") from error
        return place

    def _repr_html_(self) -> str:
        """The frame keeps the page's style from the notebook, and the notebook's from the page."""
        page = html.escape(self.html)
        return f'<iframe srcdoc="{page}" style="width:100%;height:40rem;border:0"></iframe>'


def report(
    path: str | Path, compare: str | Path | None = None, *, trust_remote_code: bool = False
) -> Report:
    """The report on a quantized folder or hub name: bytes, bits, quality, use and errors of every
    expert, routing, memory, fallbacks and provenance. Nothing is computed: what the page does not
    have was not recorded, and the page names the command that records it.

    compare: another quantized folder, to be shown beside the first.

    Returns a `Report`, which a notebook shows and whose `save` writes a file. Raises
    CheckpointError for a folder without qmoe_report.json, and ConfigError where matplotlib is
    missing.
    """
    check_can_plot()
    first = gather(path, trust_remote_code)
    if compare is None:
        return _page(
            f"{first.name}, quantized by qmoe",
            [f"The original is {source_name(first.report)} ({first.report['model_type']})."],
            [(first.name, summary(first))],
            sections(first),
        )
    second = gather(compare, trust_remote_code)
    return _page(
        f"{first.name} and {second.name}",
        comparison.intro(first, second),
        [(facts.name, summary(facts)) for facts in (first, second)],
        comparison.sections(first, second),
    )


def sections(facts: Facts) -> list[Section]:
    """All of a page on one folder, in order."""
    middle = (use, coverage, errors, routing, storage, memory)
    made = [quality(facts), *budget(facts), *(section(facts) for section in middle)]
    return [*made, *prediction(facts), departures(facts), provenance(facts)]


def _page(title: str, intro: list[str], summaries: list[Any], parts: list[Section]) -> Report:
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    template = environment.from_string((HERE / "page.html.j2").read_text(encoding="utf-8"))
    style = Markup((HERE / "page.css").read_text(encoding="utf-8"))
    return Report(
        template.render(title=title, intro=intro, summaries=summaries, sections=parts, style=style)
    )
