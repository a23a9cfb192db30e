"""A short run of the faults; `make torture MINUTES=n` makes long ones."""

from tests.torture.run import keep, torture

_SECONDS = 8.0
_SEED = 7


async def test_faults_at_random() -> None:
    """Whatever dies, hangs or is cut: everything acknowledged is stored once, as answered, and followers see just that.

    The whole list of what is checked is in `checker`.
    """
    async for result in torture([_SEED], _SECONDS):
        assert not result.found, keep(result)
        assert not result.oddities
        assert result.faults.total() > 5
        assert result.outcomes["stored"] > 100
        assert result.events_read > result.events
