"""`python train.py ...` from a checkout is `servegym train ...`."""

import sys

from servegym.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
