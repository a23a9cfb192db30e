"""Reading `/metrics` as Prometheus does."""

from collections.abc import Mapping
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

TIMEOUT = 30.0


@dataclass(frozen=True)
class Kind:
    """What is said of a metric."""

    type: str
    labels: frozenset[str]
    meaning: str


class Scrape:
    """An answer."""

    def __init__(self, text: str) -> None:
        families = list(text_string_to_metric_families(text))
        self.samples: list[Sample] = [sample for family in families for sample in family.samples]
        self.kinds: Mapping[str, Kind] = {
            family.name + ("_total" if family.type == "counter" else ""): Kind(
                family.type,
                frozenset(label for sample in family.samples for label in sample.labels if label != "le"),
                family.documentation,
            )
            for family in families
        }

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have a name and these labels; 0 when there are none."""
        return sum(
            sample.value for sample in self.samples if sample.name == name and labels.items() <= sample.labels.items()
        )


def scrape(address: str, *, per_worker: bool = False) -> Scrape:
    """Ask a gateway, on a connection of its own."""
    query = {"per": "worker"} if per_worker else {}
    answer = httpx.get(f"http://{address}/metrics", params=query, timeout=TIMEOUT, trust_env=False)
    assert answer.status_code == 200, answer.text
    return Scrape(answer.text)
