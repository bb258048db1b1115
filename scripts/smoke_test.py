"""Build sdist and wheels, install each wheel into a clean environment, and use it there.

    python -P scripts/smoke_test.py --dist dist             # packages come from the package index
    python -P scripts/smoke_test.py --dist dist --borrow    # from the Python that runs this script

The wheels are built from the sdist: one with the CPU kernels for this platform, and one without
them (QMOE_PURE=1) for every platform. In each environment, outside of the repository, a small model
is quantized, audited, reported on, loaded and asked to continue a text.

scripts/wheels.py builds those that go to a package index.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from wheels import ROOT, build_sdist, native, pure, run

DEMO = ROOT / "tests" / "data" / "demo-moe"
USE = """
import sys, pathlib, qmoe
assert pathlib.Path(qmoe.__file__).is_relative_to(sys.prefix), qmoe.__file__
model, tokenizer = qmoe.load("int4", progress=False)
ids = tokenizer("It was the opinion of", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0]))
"""
COMMANDS = (
    ["--version"],
    ["info"],
    ["quantize", "demo", "int4", "--preset", "fast", "--samples", "4"],
    ["inspect", "int4"],
    ["report", "int4"],
)


def use(wheel: Path, borrow: bool) -> None:
    """Install a wheel into an environment of its own, and run every command there."""
    with tempfile.TemporaryDirectory(prefix="qmoe-smoke-") as made:
        place = Path(made)
        python, qmoe = (str(place / "venv" / "bin" / name) for name in ("python", "qmoe"))
        run([sys.executable, "-m", "venv", "venv"], place)
        install = [python, "-m", "pip", "install", "--quiet", "--force-reinstall"]
        if borrow:
            sites = [path for path in sys.path if path.endswith("site-packages")]
            own = run([python, "-c", "import site; print(site.getsitepackages()[0])"], place)
            (Path(own.strip()) / "borrowed.pth").write_text("\n".join(sites) + "\n")
            install.append("--no-deps")
            run([*install, str(wheel)], place)
        else:
            constraints = ["--constraint", str(ROOT / "constraints.txt")]
            run([*install, *constraints, f"{wheel}[report]"], place)
        shutil.copytree(DEMO, place / "demo")
        for command in COMMANDS:
            out = run([qmoe, *command], place)
            shown = [line for line in out.splitlines() if line.startswith(("qmoe", "CPU kernels"))]
            print("\n".join(["$ qmoe " + " ".join(command), *(f"    {line}" for line in shown)]))
        card = (place / "int4" / "README.md").read_text(encoding="utf-8")
        assert "qmoe quantize demo" in card and (place / "report.html").stat().st_size > 10_000
        print("    " + run([python, "-c", USE], place).strip())
        has_kernels = "C kernels, " in run([qmoe, "info"], place)
        if has_kernels == wheel.name.endswith("-any.whl"):
            sys.exit(f"{wheel.name}: the kernels that it promises are not those that run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where they are put")
    parser.add_argument("--borrow", action="store_true", help="install no other packages")
    args = parser.parse_args()
    dist = args.dist.resolve()
    sdist = build_sdist(dist)
    print(f"Python {sys.version.split()[0]}, {sdist.name}: {sdist.stat().st_size} bytes")
    for wheel in (native(sdist, dist), pure(sdist, dist)):
        print(f"{wheel.name}: {wheel.stat().st_size} bytes")
        use(wheel, args.borrow)
    print("passed")


if __name__ == "__main__":
    main()
