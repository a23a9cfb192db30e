"""The settings of a server: one frozen object, read once."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from collab_service.model import Limits, QueueLimits
from collab_service.model.limits import DEFAULT_MAX_CONNECTIONS, DEFAULT_MAX_FOLLOWERS, DEFAULT_MAX_MEMORY_BYTES

DEFAULT_HTTP_ADDRESS = "127.0.0.1:8080"
DEFAULT_MAX_BODY_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Config:
    """How to run a server."""

    data_dir: Path
    """Where the PostgreSQL of our own keeps its data; used without a `database_url`."""
    database_url: str | None = None
    database_pool_size: int = 10
    """Connections for all but appending (up to six), tails (two), notifications (two) and health (one)."""
    grpc_address: str = "127.0.0.1:50051"
    http_address: str | None = DEFAULT_HTTP_ADDRESS
    """Where the JSON gateway listens; None for no gateway."""
    cors_origins: Sequence[str] = ()
    """Origins whose pages may call the gateway from a browser."""
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    """What an HTTP request may bring."""
    workers: int = 1
    """Processes that serve."""
    share_port: bool = False
    """Let other processes listen on the same ports, as the workers of one `collab serve` do."""
    keepalive: float = 30.0
    """Seconds of silence after which a client is asked for a sign of life."""
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    """Connections at once, at each port of a process."""
    max_followers: int = DEFAULT_MAX_FOLLOWERS
    """Follows at once, of all sessions together."""
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES
    """Resident memory of a process, from where on calls that wait for their clients are ended."""
    notify: bool = True
    """Tell other processes of changes and listen to theirs; without, they are seen when each looks for itself."""
    shutdown_grace: float = 10.0
    """Seconds that calls in progress get to finish when the server stops."""
    limits: Limits = field(default_factory=Limits)
    queue: QueueLimits = field(default_factory=QueueLimits)
