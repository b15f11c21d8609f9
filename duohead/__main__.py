"""``python -m duohead`` is the ``duohead`` command, for places where scripts are not on the path."""

import sys

from duohead.cli import main

if __name__ == "__main__":
    sys.exit(main())
