"""`python -m sentencekv`."""

import sys

from sentencekv.cli import main

if __name__ == "__main__":
    sys.exit(main())
