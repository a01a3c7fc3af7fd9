"""Measures how long each role worked in a step, and how many tokens it processed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rhythm.cluster.roles import Role


@dataclass
class Rates:
    """Counters that the roles add to during a step; `pop_metrics` reads and clears them.

    processes: number per role. busy: seconds worked, summed over a role's processes; tokens, seconds: of a role's main
    work, for tokens per second. statistics: seconds spent on attention statistics. restarts: of processes, over the
    whole run.
    """

    processes: dict[Role, int]
    busy: dict[Role, float] = field(default_factory=dict)
    tokens: dict[Role, int] = field(default_factory=dict)
    seconds: dict[Role, float] = field(default_factory=dict)
    statistics: float = 0.0
    restarts: dict[Role, int] = field(default_factory=dict)

    def worked(self, role: Role, seconds: float) -> None:
        """Count the working time of a process of `role`."""
        self.busy[role] = self.busy.get(role, 0.0) + seconds

    def processed(self, role: Role, tokens: int, seconds: float) -> None:
        """Count that `role` as a whole processed `tokens` in `seconds`."""
        self.tokens[role] = self.tokens.get(role, 0) + tokens
        self.seconds[role] = self.seconds.get(role, 0.0) + seconds

    def restarted(self, role: Role) -> int:
        """Count a restart of a process of `role`; returns the number of its restarts so far."""
        self.restarts[role] = self.restarts.get(role, 0) + 1
        return self.restarts[role]

    def pop_metrics(self, step_seconds: float) -> dict[str, float]:
        """The step's metrics; resets everything but the restarts.

        tokens_per_second_ROLE; idle_share_ROLE: idle fraction of its processes' time; attention_share: fraction of the
        step spent on attention statistics, NaN where the engine can't measure it; restarts_ROLE.
        """
        numbers = {"attention_share": self.statistics / step_seconds}
        for role, processes in self.processes.items():
            seconds = self.seconds.get(role, 0.0)
            numbers[f"tokens_per_second_{role}"] = self.tokens.get(role, 0) / seconds if seconds else math.nan
            numbers[f"idle_share_{role}"] = 1 - self.busy.get(role, 0.0) / (processes * step_seconds)
            numbers[f"restarts_{role}"] = float(self.restarts.get(role, 0))
        self.clear()
        return numbers

    def clear(self) -> None:
        """Reset everything but the restarts."""
        self.busy, self.tokens, self.seconds, self.statistics = {}, {}, {}, 0.0
