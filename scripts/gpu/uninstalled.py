"""qmoe from this checkout without installing it.

kernels/ and calibration/ lie beside qmoe/ but are imported as qmoe.kernels and qmoe.calibration
(pyproject.toml), and a folder named `kernels` on sys.path would shadow Hugging Face's package of
that name. So a folder of links is made, in which all three lie as they are imported. By hand:

    python scripts/gpu/uninstalled.py FOLDER
    PYTHONPATH=FOLDER python -P ...
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def link_package(folder: Path) -> Path:
    """Make `folder` one that PYTHONPATH can name; returns it. What is linked already stays."""
    package = folder / "qmoe"
    package.mkdir(parents=True, exist_ok=True)
    inside = [path for path in (ROOT / "qmoe").iterdir() if path.name != "__pycache__"]
    for path in [*inside, ROOT / "kernels", ROOT / "calibration"]:
        link = package / path.name
        if not link.is_symlink():
            link.symlink_to(path)
    return folder


if __name__ == "__main__":
    print(link_package(Path(sys.argv[1]).resolve()))
