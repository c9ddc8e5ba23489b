"""`python evaluate.py ...` from a checkout is `servegym evaluate ...`."""

import sys

from servegym.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
