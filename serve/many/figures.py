"""The figures of all replicas as one page, each with its replica's name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


class _Merged:
    """A collector of what pages in Prometheus' text format tell."""

    def __init__(self, pages: Mapping[str, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for replica, page in self._pages.items():
            for one in text_string_to_metric_families(page):
                family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
                for sample in one.samples:
                    family.samples.append(sample._replace(labels={**sample.labels, "replica": replica}))
        yield from families.values()


def merged(pages: Mapping[str, str]) -> bytes:
    """One page of the pages of replicas, by their names."""
    registry = CollectorRegistry()
    registry.register(_Merged(pages))
    return generate_latest(registry)
