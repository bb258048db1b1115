"""`qmoe-transformers`: the `transformers` command, which runs packed what qmoe wrote.

transformers' own command imports no other package, so `transformers serve` expands the weights.
"""

from transformers.cli.transformers import main as transformers_main


def main() -> None:
    """`qmoe-transformers serve FOLDER` is `transformers serve FOLDER` after `import qmoe`, which
    came before this module."""
    transformers_main()


if __name__ == "__main__":
    main()
