"""What a page says of layers that predict tokens beyond the next."""

from qmoe.html_report.facts import Facts
from qmoe.html_report.section import Section, Table
from qmoe.packed.card_text import source_name
from qmoe.prediction.stored import in_words


def prediction(facts: Facts) -> list[Section]:
    """Which layers there are, and how many of their drafts are accepted; no section if there are
    none."""
    found = facts.report.get("prediction")
    if not found:
        return []
    accepted = facts.measured.get("eval", {}).get("acceptance", {})
    if not accepted:
        said = "How many drafts are accepted is not recorded."
        command = f"qmoe eval {facts.name} --against {source_name(facts.report)} --save"
        code = [command] if "layer" in found else []
        return [Section("Layers that predict ahead", [said], items=in_words(found), code=code)]
    said = (
        "A draft is accepted where the model itself finds the drafted token most likely. What is "
        "counted is the first draft after every token of held-out text."
    )
    domains = next(iter(accepted.values()))
    rows = [[name, *(f"{of[name]:.1%}" for of in accepted.values())] for name in domains]
    table = Table("Accepted drafts", ["domain", *accepted], rows)
    return [Section("Layers that predict ahead", [said], tables=[table], items=in_words(found))]
