"""The tests."""

import os

# Before anything imports grpc: the tests start processes and never fork, and grpc's fork handlers have crashed the
# child that was to become another program.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
