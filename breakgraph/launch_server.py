"""``python -m breakgraph.launch_server``: the same as ``breakgraph serve``."""

import sys

from breakgraph.cli import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
