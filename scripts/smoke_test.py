"""Build sdist and wheels, install each wheel into a clean environment, and use it there.

    python -P scripts/smoke_test.py --dist dist             # packages come from the package index
    python -P scripts/smoke_test.py --dist dist --borrow    # from the Python that runs this script

The wheels are built from the sdist: one with the CPU kernels for this platform, and one without
them (QMOE_PURE=1) for every platform. In each environment, outside of the repository, a small model
is quantized, audited, reported on, loaded and asked to continue a text.

For a package index, `auditwheel repair` gives the first wheel the manylinux tag that its libraries
allow: 2_34 if it was built on Debian 12.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
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


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Standard output of a command; ends the script if it fails."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def build(dist: Path) -> list[Path]:
    """The sdist, and the two wheels that are built from it, which are returned."""
    dist.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(dist)!r}))"
    sdist = dist / run([sys.executable, "-c", code], ROOT).strip().splitlines()[-1]
    print(f"{sdist.name}: {sdist.stat().st_size} bytes")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    wheel += ["--no-build-isolation", "--wheel-dir", str(dist), str(sdist)]
    for pure in ("0", "1"):
        run(wheel, dist, QMOE_PURE=pure)
    wheels = sorted(dist.glob("qmoe-*.whl"))
    if [path.name.endswith("-any.whl") for path in wheels] != [False, True]:
        sys.exit(f"expected one wheel with the CPU kernels and one without, found {wheels}")
    return wheels


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
            print(f"{wheel.name}: the kernels that it promises are not those that run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where they are put")
    parser.add_argument("--borrow", action="store_true", help="install no other packages")
    args = parser.parse_args()
    for wheel in build(args.dist.resolve()):
        print(f"{wheel.name}: {wheel.stat().st_size} bytes")
        use(wheel, args.borrow)
    print("passed")


if __name__ == "__main__":
    main()
