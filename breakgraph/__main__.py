"""``python -m breakgraph``: the command line."""

import sys

from breakgraph.cli import main

if __name__ == "__main__":
    sys.exit(main())
