"""`python -m loadtest.gpu`: see `command.py`."""

import sys

from loadtest.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
