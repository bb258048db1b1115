"""`python -m qmoe`, and `torchrun ... -m qmoe`: the `qmoe` command."""

import sys

from qmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
