"""What a measurement comes to, and how it is judged."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Target:
    """``on``: the ratio (value / baseline) or the value itself; ``at``: it holds at most, or at least, at ``limit``."""

    on: Literal["ratio", "value"]
    at: Literal["most", "least"]
    limit: float


@dataclass(frozen=True)
class Figure:
    """``baseline`` is measured in the same run, with the same end point; None where none is meaningful.
    ``target`` None: reported, not judged."""

    name: str
    value: float
    unit: str
    baseline: float | None = None
    target: Target | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.baseline is None else self.value / self.baseline

    @property
    def holds(self) -> bool | None:
        if self.target is None:
            return None
        judged = self.value if self.target.on == "value" else self.ratio
        if judged is None:
            raise ValueError(f"{self.name} is judged by a ratio and has no baseline")
        return judged <= self.target.limit if self.target.at == "most" else judged >= self.target.limit

    def to_json(self) -> dict[str, object]:
        return {
            "name": self.name,
            "value": round(self.value, 4),
            "unit": self.unit,
            "baseline": None if self.baseline is None else round(self.baseline, 4),
            "ratio": None if self.ratio is None else round(self.ratio, 3),
            "target": None if self.target is None else self.target.limit,
            "holds": self.holds,
        }


def at_most(limit: float, on: Literal["ratio", "value"] = "ratio") -> Target:
    return Target(on, "most", limit)


def at_least(limit: float, on: Literal["ratio", "value"] = "ratio") -> Target:
    return Target(on, "least", limit)


def percentile(samples: Sequence[float], percent: int) -> float:
    """The smallest sample that ``percent`` of all are not above (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)]


def median(samples: Sequence[float]) -> float:
    if len(samples) < 5:
        raise ValueError("a figure is the median of at least 5 samples")
    return statistics.median(samples)
