"""Collaboration sessions as durable, ordered, append-only event logs, kept in PostgreSQL, served over gRPC."""

__version__ = "0.1.0"
