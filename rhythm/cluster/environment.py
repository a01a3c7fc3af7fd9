"""Sets environment variables that must be set before Ray is imported."""

from __future__ import annotations

import os

from rhythm.cluster.config import ClusterConfig


def prepare_ray_environment(config: ClusterConfig) -> None:
    """Make Ray listen on `bind_address`, send no usage statistics, require a token from its clients, and start no
    processes before they are asked for: those would lack the run's variables, and end unused.

    Even with 127.0.0.1 Ray listens on an address that other machines can reach, unless clusters of several machines are
    disabled. It reads the variable for that, named after the systems where it is off by default, on import.
    """
    if config.on_loopback:
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
