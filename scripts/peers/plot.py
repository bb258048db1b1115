"""The comparison as a picture: KL relative to round-to-nearest against stored bits per weight."""

from pathlib import Path
from typing import Any

MARKS = "osD^v<>PX*hp"


def draw(rows: list[dict[str, Any]], path: Path) -> bool:
    """One panel per model and regime, the first seed. False where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [r for r in rows if "kl_over_rtn" in r and r["seed"] == rows[0]["seed"]]
    rows = [r for r in rows if not r["method"].startswith("balanced ")]  # the table has variants
    models = list(dict.fromkeys(r["model"] for r in rows))
    regimes = list(dict.fromkeys(r["regime"] for r in rows))
    looks = _looks(list(dict.fromkeys(r["method"] for r in rows)))
    figure, axes = pyplot.subplots(
        len(models), len(regimes), figsize=(5.2 * len(regimes) + 2.4, 4 * len(models)),
        squeeze=False, sharey=True, sharex=True,
    )  # fmt: skip
    for i, model in enumerate(models):
        for j, regime in enumerate(regimes):
            _panel(axes[i][j], [r for r in rows if (r["model"], r["regime"]) == (model, regime)],
                   looks)  # fmt: skip
            axes[i][j].set_title(f"{model}, {regime} calibration", fontsize=10)
        axes[i][0].set_ylabel("KL / KL of round-to-nearest")
    for axis in axes[-1]:
        axis.set_xlabel("stored bits per quantized weight")
    handles = [pyplot.Line2D([], [], label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="center right", fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / (5.2 * len(regimes) + 2.4), 1))
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
    return True


def _looks(methods: list[str]) -> dict[str, dict[str, Any]]:
    """Ours in strong colours and joined by lines, peers hollow."""
    looks: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(methods):
        peer = " " in name or name.startswith(("autoround", "gptqmodel"))
        looks[name] = {
            "color": f"C{i % 10}", "marker": MARKS[i % len(MARKS)], "markersize": 6,
            "markerfacecolor": "none" if peer else f"C{i % 10}",
            "linestyle": ":" if peer else "-", "linewidth": 1,
        }  # fmt: skip
    return looks


def _panel(axis: Any, rows: list[dict[str, Any]], looks: dict[str, dict[str, Any]]) -> None:
    for name, look in looks.items():
        mine = sorted((r["bits_per_weight"], r["kl_over_rtn"]) for r in rows if r["method"] == name)
        axis.plot([x for x, _ in mine], [y for _, y in mine], **look)
    axis.set_yscale("log")
    ticks = [0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1]
    axis.set_yticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
