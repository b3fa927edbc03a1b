"""``python -m breakgraph.evaluation``."""

import sys

from breakgraph.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
