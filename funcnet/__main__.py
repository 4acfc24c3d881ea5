"""The command line: `python -m funcnet`."""

import sys

from funcnet.check.command import main

if __name__ == "__main__":
    sys.exit(main())
