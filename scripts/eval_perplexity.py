"""`qmoe eval` as a script: the same options, the same functions. See --help."""

import sys

from qmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
