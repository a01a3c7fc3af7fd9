"""Who worked how long in a step, and how many tokens went through."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from rhythm.cluster.roles import Role


@dataclass
class Rates:
    """Added up over a step by the roles; read and cleared by `pop_metrics`.

    busy: seconds of work of all processes of a role; tokens and seconds: of a role's main work, for tokens a
    second. statistics: seconds of attention statistics. restarts: of processes, over the whole run.
    """

    processes: dict[Role, int]
    busy: dict[Role, float] = field(default_factory=dict)
    tokens: dict[Role, int] = field(default_factory=dict)
    seconds: dict[Role, float] = field(default_factory=dict)
    statistics: float = 0.0
    restarts: dict[Role, int] = field(default_factory=dict)

    def worked(self, role: Role, seconds: float) -> None:
        """A process of `role` was busy."""
        self.busy[role] = self.busy.get(role, 0.0) + seconds

    def processed(self, role: Role, tokens: int, seconds: float) -> None:
        """`role` as a whole got through `tokens` in `seconds`."""
        self.tokens[role] = self.tokens.get(role, 0) + tokens
        self.seconds[role] = self.seconds.get(role, 0.0) + seconds

    def restarted(self, role: Role) -> int:
        """One of its processes was lost and started again; how often that has happened."""
        self.restarts[role] = self.restarts.get(role, 0) + 1
        return self.restarts[role]

    def pop_metrics(self, step_seconds: float) -> dict[str, float]:
        """A step's numbers, then everything but the restarts starts from zero.

        tokens_per_second_ROLE; idle_share_ROLE: of the time of its processes; attention_share: of the step
        spent in attention statistics, NaN where the engine doesn't know; restarts_ROLE.
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
        """Everything but the restarts starts from zero."""
        self.busy, self.tokens, self.seconds, self.statistics = {}, {}, {}, 0.0
