"""Virtual environments, one per peer, made from the pinned packages in `<peer>.txt`."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def python_of(peer: str, work: Path) -> Path:
    """The Python of a peer's environment, made on the first call. A peer without a list of
    packages of its own runs in this environment. CalledProcessError if pip fails."""
    pins = HERE / f"{peer}.txt"
    if not pins.is_file():
        return Path(sys.executable)
    place = work / "venvs" / peer
    python, made = place / "bin" / "python", place / "made"
    wanted = pins.read_text()
    if not made.is_file() or made.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
        # The lists are whole. A request for torch inside a package must not choose its build, nor
        # refuse one that works (gptqmodel asks for a newer one than it needs).
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--requirement", str(pins)], check=True)
        made.write_text(wanted)
    return python
