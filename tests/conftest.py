"""What holds for the whole suite."""

import os

# Tests start programs while gRPC works in this process: its handlers of forks would write lines of their own between
# those of the programs. To be set before grpc is imported.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "false"
