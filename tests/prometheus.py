"""Reads what a gateway tells Prometheus, with Prometheus' own parser."""

from collections.abc import Iterator
from typing import Any

from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain


class Samples:
    """The samples of one scrape: ``samples("gateway_requests_total", status="2xx")`` adds up those that fit."""

    def __init__(self, text: str) -> None:
        # OpenMetrics' parser is strict: about types, units, order, and an end.
        self._families = list((openmetrics if text.endswith("# EOF\n") else plain)(text))
        self.names = {sample.name for family in self._families for sample in family.samples}

    def __call__(self, name: str, **labels: str) -> float:
        assert name in self.names, f"{name} is not among {sorted(self.names)}"
        return sum(sample.value for sample in self._all() if sample.name == name and labels.items() <= sample.labels.items())

    def values(self, name: str, label: str) -> set[str]:
        """The values that a label has."""
        return {sample.labels[label] for sample in self._all() if sample.name == name}

    def label_values(self) -> set[str]:
        return {value for sample in self._all() for value in sample.labels.values()}

    def undescribed(self) -> list[str]:
        return [family.name for family in self._families if not family.documentation or family.type == "unknown"]

    def _all(self) -> Iterator[Any]:
        return (sample for family in self._families for sample in family.samples)
