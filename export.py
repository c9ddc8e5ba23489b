"""`python export.py ...` from a checkout is `servegym export ...`."""

import sys

from servegym.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
