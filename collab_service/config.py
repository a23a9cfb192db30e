"""The settings of a server: one frozen object, read once."""

from dataclasses import dataclass, field
from pathlib import Path

from collab_service.model import Limits, QueueLimits


@dataclass(frozen=True, slots=True)
class Config:
    """How to run a server."""

    data_dir: Path
    """Where the PostgreSQL of our own keeps its data; used without a `database_url`."""
    database_url: str | None = None
    database_pool_size: int = 10
    """Connections for everything but appending, which has up to six of its own."""
    grpc_address: str = "127.0.0.1:50051"
    http_address: str = "127.0.0.1:8080"
    """For the JSON gateway, which is not there yet."""
    shutdown_grace: float = 10.0
    """Seconds that calls in progress get to finish when the server stops."""
    limits: Limits = field(default_factory=Limits)
    queue: QueueLimits = field(default_factory=QueueLimits)
