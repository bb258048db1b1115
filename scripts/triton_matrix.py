"""Run the kernel report under several versions of Triton, each installed into a folder of its own.

    python scripts/triton_matrix.py 3.6.0 3.7.1 3.8.0 3.9.0

Needs pip and a package index. Code generation changes between versions; the gates must hold on all.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

REPORT = Path(__file__).with_name("kernel_report.py")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("versions", nargs="+", help="of Triton, such as 3.8.0")
    parser.add_argument("--arch", action="append", default=[], help="passed to the report")
    args = parser.parse_args()
    failed = []
    for version in args.versions:
        with tempfile.TemporaryDirectory(prefix=f"triton-{version}-") as folder:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
            subprocess.run([*install, "--target", folder, f"triton=={version}"], check=True)
            environment = os.environ | {"PYTHONPATH": folder, "TRITON_CACHE_DIR": f"{folder}/cache"}
            options = [word for arch in args.arch for word in ("--arch", arch)]
            command = [sys.executable, "-P", str(REPORT), *options]
            print(f"Triton {version}", flush=True)
            if subprocess.run(command, env=environment, check=False).returncode:
                failed.append(version)
    print("gates hold on all versions" if not failed else f"gates fail on {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
