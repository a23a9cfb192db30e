"""What PostgreSQL alone reaches, driven by pgbench and COPY, into and out of the service's own tables."""

import os
import re
import subprocess
import tempfile
import time

import psycopg

from collab_service.storage.embedded import Cluster
from collab_service.storage.repository.rows import EVENT_COLUMNS
from tests.bench.load import PAYLOAD

_EVENT = f"""'ada', 7, 'edit', '{PAYLOAD.replace(":", "' || chr(58) || '")}', now(), '\\\\x{"ab" * 32}'"""
_COLUMNS = "session_id, server_seq, actor_id, client_seq, type, payload_json, created_at, chain_hash"
# Lock the session, take the next numbers, insert, commit: what everybody writes first, with one event or more.
_APPEND = f"""
BEGIN;
SELECT id FROM collab_sessions WHERE id = :session FOR UPDATE;
INSERT INTO collab_events ({_COLUMNS})
    SELECT :session, head.seq + n, {_EVENT}
    FROM (SELECT coalesce(max(server_seq), 0) AS seq FROM collab_events WHERE session_id = :session) AS head,
        generate_series(1, :events) AS n;
COMMIT;
"""


def append_rate(cluster: Cluster, session: int, *, clients: int, events: int = 1, seconds: int) -> float:
    """Return the transactions per second of pgbench that each append so many events to one session."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(_APPEND)
        script.flush()
        command = [
            str(cluster.bin / "pgbench"), "--no-vacuum", f"--client={clients}", "--jobs=2", f"--time={seconds}",
            f"--define=session={session}", f"--define=events={events}", f"--file={script.name}", cluster.url,
        ]  # fmt: skip
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds + 60, check=True, env={"PATH": os.defpath}
        )
    found = re.search(r"tps = ([\d.]+)", result.stdout)
    if found is None or "number of failed transactions: 0 " not in result.stdout:
        raise RuntimeError(f"pgbench did not work:\n{result.stdout}\n{result.stderr}")
    return float(found[1])


def copy_rate(url: str, session: int, count: int) -> float:
    """Return the events a second of a COPY of a session's rows, in order, which nobody looks at.

    Without the column that the service adds for its own reading.
    """
    with psycopg.connect(url) as connection:
        started = time.perf_counter()
        size = 0
        rows = (
            f"(SELECT {', '.join(EVENT_COLUMNS)} FROM collab_events WHERE session_id = {session} ORDER BY server_seq)"
        )
        with connection.cursor().copy(f"COPY {rows} TO STDOUT (FORMAT binary)") as copy:
            for data in copy:
                size += len(data)
        seconds = time.perf_counter() - started
    if size < count * len(PAYLOAD):
        raise RuntimeError("the rows did not come")
    return count / seconds
