"""`make torture`, or `python -m tests.torture --minutes N --seed S`."""

import sys

from tests.torture.run import main

if __name__ == "__main__":
    sys.exit(main())
