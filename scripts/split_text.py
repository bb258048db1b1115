"""Cut raw text into disjoint train and held-out parts, and the small pieces that ship with qmoe.

    python scripts/split_text.py RAW_DIR WORK_DIR

RAW_DIR holds `<domain>.txt`. Written: `WORK_DIR/<domain>.train.txt` (what the demo model is trained
on), `calibration/text/<domain>.txt` (an even sample of the train part) and
`calibration/text/heldout/<domain>.txt` (a sample of the held-out part, which no training and no
calibration ever sees). Needed only to rebuild what is already in the repository.
"""

import argparse
import re
from pathlib import Path

SHIPPED = Path(__file__).resolve().parents[1] / "calibration" / "text"
SECTIONS, HELDOUT = 20, (6, 13)
CALIBRATION_CHARS, HELDOUT_CHARS = 310_000, 66_000


def paragraphs(text: str) -> list[str]:
    """Blank-line separated units; a unit over 4,000 characters is cut at its line ends."""
    units: list[str] = []
    for block in re.split(r"\n\s*\n", text):
        units += block.split("\n") if len(block) > 4000 else [block]
    return [u for u in units if u.strip()]


def sections(units: list[str]) -> list[list[str]]:
    """Contiguous runs of units holding about the same number of characters."""
    total, seen = sum(map(len, units)), 0
    out: list[list[str]] = [[] for _ in range(SECTIONS)]
    for unit in units:
        out[min(seen * SECTIONS // total, SECTIONS - 1)].append(unit)
        seen += len(unit)
    return out


def sample(units: list[str], chars: int) -> str:
    """Eight contiguous runs of units, evenly spaced, `chars` characters in all."""
    text = "\n\n".join(units)
    size, step = chars // 8, len(text) // 8
    runs = (text[i * step : i * step + size] for i in range(8))
    return "\n\n".join(run[run.find("\n") + 1 : run.rfind("\n")] for run in runs) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", type=Path)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    (SHIPPED / "heldout").mkdir(parents=True, exist_ok=True)
    for path in sorted(args.raw.glob("*.txt")):
        parts = sections(paragraphs(path.read_text(encoding="utf-8")))
        train = [u for i, part in enumerate(parts) if i not in HELDOUT for u in part]
        # Some sources repeat paragraphs; a held-out paragraph must not occur in training.
        known = {" ".join(u.split()) for u in train}
        held = [u for i in HELDOUT for u in parts[i] if " ".join(u.split()) not in known]
        (args.work / f"{path.stem}.train.txt").write_text("\n\n".join(train), encoding="utf-8")
        (SHIPPED / path.name).write_text(sample(train, CALIBRATION_CHARS), encoding="utf-8")
        (SHIPPED / "heldout" / path.name).write_text(sample(held, HELDOUT_CHARS), encoding="utf-8")
        print(f"{path.stem}: {len(train)} train and {len(held)} held-out units")


if __name__ == "__main__":
    main()
