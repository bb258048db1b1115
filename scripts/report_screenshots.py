"""Show pages of `qmoe report` in headless Chromium: check them there, and take screenshots.

    python -P scripts/report_screenshots.py REPORT.html --out DIR

Writes wide.png, phone.png and dark.png. The exit status is 1 if a page prints an error to the
console, asks for anything on the network, or is wider than a telephone of 390 pixels.
"""

import argparse
import html
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PHONE = 390  # CSS pixels
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--enable-logging=stderr", "--proxy-server=127.0.0.1:9",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome")
DARK = "--blink-settings=preferredColorScheme=0"
CONSOLE = re.compile(r"CONSOLE(?::\d+)?[^\n]*")
# Chromium's windows are never narrower than 500 pixels, so a frame stands for the telephone.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="f" style="border:0;width:{width}px;height:{height}px" srcdoc="{page}"
onload="const root = f.contentDocument.documentElement;
document.title = root.scrollWidth + ' ' + root.scrollHeight"></iframe>"""


def chromium(page: str, *options: str) -> tuple[str, str]:
    """Standard output and error of a browser that shows the page."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        sys.exit(f"no browser: expected one of {', '.join(NAMES)} on PATH")
    with tempfile.TemporaryDirectory(prefix="qmoe-report-") as folder:
        path = Path(folder) / "page.html"
        path.write_text(page, encoding="utf-8")
        command = [found, *OPTIONS, f"--user-data-dir={folder}/user", *options, path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, done.stderr


def sizes(page: str, width: int) -> tuple[int, int, list[str]]:
    """Width and height that the page takes in a frame of this width, and lines of the console."""
    frame = FRAME.format(width=width, height=900, page=html.escape(page))
    dom, log = chromium(frame, "--virtual-time-budget=2000", "--dump-dom")
    found = re.search(r"<title>(\d+) (\d+)</title>", dom)
    if found is None:
        sys.exit("the browser did not show the page")
    return int(found[1]), int(found[2]), CONSOLE.findall(log)


def screenshot(page: str, path: Path, width: int, height: int, *options: str) -> None:
    frame = FRAME.format(width=width, height=height, page=html.escape(page))
    window = f"--window-size={max(width, 500)},{height}"
    chromium(frame, window, f"--screenshot={path}", *options)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page", type=Path, help="what `qmoe report` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the screenshots")
    parser.add_argument("--most", type=int, default=2400, help="pixels of height to show at most")
    args = parser.parse_args()
    page = args.page.read_text(encoding="utf-8")
    args.out.mkdir(parents=True, exist_ok=True)
    wrong = []
    for name, width, options in (("wide", 1280, ()), ("phone", PHONE, ()), ("dark", 1280, (DARK,))):
        wide, high, console = sizes(page, width)
        print(f"{name}: {wide} x {high} pixels in a window of {width}")
        wrong += console
        if wide > width:
            wrong.append(f"{name}: the page is {wide} pixels wide in a window of {width}")
        where = args.out.resolve() / f"{name}.png"
        screenshot(page, where, width, min(high, args.most), *options)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
