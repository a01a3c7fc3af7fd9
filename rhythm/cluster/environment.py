"""What has to be in the environment before Ray is imported."""

from __future__ import annotations

import os

from rhythm.cluster.config import ClusterConfig


def prepare_environment(config: ClusterConfig) -> None:
    """Let Ray listen where `bind_address` says, send nothing about its use, and ask its clients for a token.

    Ray takes an address that other machines can reach even where it is told 127.0.0.1, unless clusters of several
    machines are turned off; it reads that switch, named after the systems it is off on by default, on import.
    """
    if config.on_loopback:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
