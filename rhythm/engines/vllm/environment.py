"""The environment variables that vLLM reads; nothing here imports vLLM."""

from __future__ import annotations

import ipaddress
import os

import torch


def prepare_vllm_environment(bind_address: str = "127.0.0.1") -> None:
    """Set the environment variables that vLLM reads. Call it before anything imports vLLM.

    `bind_address`: where its workers listen for each other. Variables that are already set are kept, except the bind
    address and the one that would let vLLM unpickle messages.
    """
    os.environ["VLLM_HOST_IP"] = bind_address
    os.environ["VLLM_LOOPBACK_IP"] = bind_address
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "0"
    # Run the engine in this process, so that weight transfers and errors need no further process in between.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    kept = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    kept["PYTHONSAFEPATH"] = "1"  # its processes don't import from the working directory first
    if ipaddress.ip_address(bind_address).is_loopback:
        kept |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    if not torch.cuda.is_available():
        # Don't bind threads: all replicas on a machine would be bound to the same cores.
        kept |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    for name, value in kept.items():
        os.environ.setdefault(name, value)
