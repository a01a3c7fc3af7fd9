"""A trainer in a separate process, for the tests of weight pushes: `python trainer_process.py SOCKET KIND CHECKPOINT`.

It serves calls over the socket: receives (method, arguments), sends (result, error).
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Client
from typing import Any

import torch
from safetensors.torch import load_file

from rhythm.engines.transfer import buckets, make_sender

BUCKET_BYTES = 100_000
"""Less than an MLP matrix of the tests' model, so that layers come in pieces."""


def main(socket: str, kind: Any, checkpoint: str) -> None:
    device = "cpu"
    if torch.cuda.is_available():
        device = "cuda:1" if kind == "nccl" else "cuda:0"  # NCCL joins no two processes on one GPU
        torch.cuda.set_device(device)
    weights = load_file(f"{checkpoint}/model.safetensors", device=device)
    sender = make_sender(kind)
    stream = buckets(weights.items(), BUCKET_BYTES)

    def stage() -> dict[str, Any] | None:
        bucket = next(stream, None)
        return None if bucket is None else sender.stage(bucket)

    methods = {"init_info": sender.init_info, "connect": sender.connect, "transmit": sender.transmit, "stage": stage}
    with Client(socket, "AF_UNIX") as connection:
        for method in iter(connection.recv, "close"):
            connection.send(methods[method]())
        sender.close()
        connection.send(None)


if __name__ == "__main__":
    main(*sys.argv[1:])
