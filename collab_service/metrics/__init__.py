"""How a process fares, as Prometheus reads it; docs/metrics.md lists all there is to see."""

from collab_service.metrics.kept import Metrics, SharedFiles
from collab_service.metrics.of_gateway import GatewayMetrics
from collab_service.metrics.of_service import (
    AppendMetrics,
    DatabaseMetrics,
    FollowMetrics,
    MethodMetrics,
    PoolMetrics,
    ReaderMetrics,
    RpcMetrics,
    ServiceMetrics,
)

__all__ = [
    "AppendMetrics",
    "DatabaseMetrics",
    "FollowMetrics",
    "GatewayMetrics",
    "MethodMetrics",
    "Metrics",
    "PoolMetrics",
    "ReaderMetrics",
    "RpcMetrics",
    "ServiceMetrics",
    "SharedFiles",
]
