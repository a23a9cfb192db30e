"""The command line."""

import os

# We start other programs (pg_ctl) and never fork a process that goes on with gRPC: its fork handlers would only be in
# the way.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
