"""Periods with which all devices and all edges finish together, by what the last round took.

Hwamei (Qi et al., ICDCS 2023, Section 2) motivates its agent with such schedules, made by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from tesserafl.core.messages import Client
from tesserafl.core.schedule import Periods, Report, Situation


def equal_finish(
    seen: Situation, *, steps: int, rounds: int, most_steps: int, most_rounds: int, unit: int = 1
) -> Mapping[str, Periods]:
    """Edge -> its periods; those of which nothing was measured take the first ones.

    D_i = median_j(t_j) x steps; gamma_i^j = floor(D_i / t_j); gamma_i = round((max_m (n_m Ts_m +
    Tc_m) - Tc_i) / Ts_i), each within 1 and its most. n_m = round(Tc_m / Ts_m), likewise within 1
    and its most: an edge works at least as long as its link takes, whoever is the slowest.

    Args:
        seen: the situation.
        steps: of the median device, and of a device of which nothing was measured, in units.
        rounds: averages of an edge of which nothing was measured.
        most_steps: units of a device, at most.
        most_rounds: averages of an edge, at most.
        unit: steps.
    """

    def of(clients: Sequence[Client], report: Report | None) -> Periods:
        units = {client.id: steps for client in clients}
        if report is None or not report.devices:
            return Periods(rounds=rounds, steps={c: unit * n for c, n in units.items()})
        each = {seen.client: seen.compute_seconds / seen.steps for seen in report.devices}
        limit = median(each.values()) * steps
        for client in units.keys() & each.keys():
            if each[client] > 0:
                units[client] = _within(math.floor(limit / each[client] + 1e-9), most_steps)
        own, averages = report.seconds / report.rounds, rounds
        if own > 0:
            averages = _within(round((longest - report.link_seconds) / own), most_rounds)
        return Periods(rounds=averages, steps={c: unit * n for c, n in units.items()})

    def alone(report: Report) -> float:
        """Seconds of an edge's round if no other edge were slower."""
        own, link = report.seconds / report.rounds, report.link_seconds
        return link + own * (_within(round(link / own), most_rounds) if own > 0 else 1)

    longest = max(map(alone, seen.reports.values()), default=0.0)
    return {edge: of(clients, seen.reports.get(edge)) for edge, clients in seen.edges.items()}


def _within(value: int, most: int) -> int:
    return min(max(value, 1), most)
