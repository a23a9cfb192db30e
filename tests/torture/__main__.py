"""`make torture`, or `python -m tests.torture --minutes N --seed S`."""

import os
import sys

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # grpc says a word for each connection that it loses

from tests.torture.run import main

if __name__ == "__main__":
    sys.exit(main())
