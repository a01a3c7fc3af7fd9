from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor

from rhythm.engines.transfer import (
    PushManifest,
    SharedMemorySender,
    buckets,
    ipc_plain,
    make_sender,
    merged,
    read_segment,
)
from rhythm.engines.vllm.environment import prepare_vllm_environment

SEGMENTS = Path("/dev/shm")


@pytest.fixture(scope="module")
def worker(_as_it_was: None) -> Any:
    """The module that runs in vLLM's workers; it imports vLLM."""
    prepare_vllm_environment()
    from rhythm.engines.vllm import worker

    return worker


def read(info: dict[str, Any]) -> dict[str, Tensor]:
    return dict(read_segment(info, torch.device("cpu")))


def test_buckets_keep_order_and_size() -> None:
    sizes = [40, 60, 10, 100, 130, 20]
    stream = [(str(i), torch.zeros(size // 2, dtype=torch.bfloat16)) for i, size in enumerate(sizes)]
    assert [[name for name, _ in bucket] for bucket in buckets(stream, 100)] == [["0", "1"], ["2"], ["3"], ["4"], ["5"]]
    assert list(buckets([], 100)) == []


def test_a_segment_holds_the_bucket_bit_for_bit() -> None:
    bucket = {
        "a": torch.randn(3, 5),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(4, 6).half().T,
        "d": torch.tensor(2.5),
    }
    with make_sender("shared_memory") as sender:
        info = sender.stage(list(bucket.items()))
        assert info["offsets"] == [0, 64, 128, 192]
        assert info["shapes"] == [[3, 5], [7], [6, 4], []]
        result = read(info)
    assert list(result) == list(bucket)
    for name, tensor in bucket.items():
        assert result[name].dtype == tensor.dtype
        assert torch.equal(result[name], tensor)


def test_what_was_read_outlives_the_next_bucket() -> None:
    with make_sender("shared_memory") as sender:
        first = read(sender.stage([("a", torch.full((8,), 1.0))]))
        second = read(sender.stage([("a", torch.full((8,), 2.0))]))
    assert first["a"].unique().tolist() == [1.0]
    assert second["a"].unique().tolist() == [2.0]


def test_one_segment_that_grows_and_goes() -> None:
    def inode(count: int) -> int:
        info = sender.stage([("a", torch.zeros(count))])
        assert info["process"] == os.getpid()
        return os.fstat(info["descriptor"]).st_ino

    before, open_before = set(SEGMENTS.iterdir()), set(os.listdir("/proc/self/fd"))
    sender = SharedMemorySender()
    small, same, large = inode(1000), inode(500), inode(100_000)
    assert small == same != large
    assert set(SEGMENTS.iterdir()) <= before, "it has no name that could be left"
    sender.close()
    sender.close()
    assert set(os.listdir("/proc/self/fd")) == open_before


STAGES_AND_WAITS = """
import json, sys, time, torch
from rhythm.engines.transfer import SharedMemorySender
sender = SharedMemorySender()
print(json.dumps(sender.stage([("a", torch.ones(1 << 20)), ("b", torch.ones(8))])), flush=True)
time.sleep(60)
"""


def test_nothing_is_left_of_a_sender_that_is_killed_in_a_push() -> None:
    """With all that it started, so that nothing is left to clean up after it. What reads then reads to its end."""
    before = set(SEGMENTS.iterdir())
    sender = subprocess.Popen(
        [sys.executable, "-c", STAGES_AND_WAITS], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert sender.stdout is not None
        info = json.loads(sender.stdout.readline())
        reading = read_segment(info, torch.device("cpu"))
        assert torch.equal(next(reading)[1], torch.ones(1 << 20))
    finally:
        os.killpg(sender.pid, signal.SIGKILL)
        sender.wait(30)
    assert torch.equal(next(reading)[1], torch.ones(8))
    assert set(SEGMENTS.iterdir()) <= before
    with pytest.raises(
        ValueError, match=r"no segment of weights \(No such file.*must be a living process of this mach"
    ):
        read(info)
    reading.close()
    assert "memfd:rhythm-weights" not in Path("/proc/self/maps").read_text()


def test_weights_may_be_sent_in_another_type() -> None:
    tensor = torch.randn(16)
    with make_sender("shared_memory", dtype=torch.bfloat16) as sender:
        assert torch.equal(read(sender.stage([("a", tensor)]))["a"], tensor.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process": 1 << 30}, r"/proc/1073741824/fd/[0-9]+ is no segment of weights \(No such file or directory\)"),
        ({"descriptor": 0}, r"/proc/[0-9]+/fd/0 is no segment of weights \(.*\): the sender must be a living process"),
        ({"descriptor": "../environ"}, "invalid literal for int"),
        ({"dtype_names": ["load"]}, "a is load: must be one of float32, bfloat16, float16"),
        ({"offsets": [4096]}, "a is at bytes 4096 to 4128 of a segment of 4096"),
        ({"offsets": [-64]}, "a is at bytes -64 to -32"),
        ({"shapes": [[4096]]}, "a is at bytes 0 to 16384 of a segment of 4096"),
    ],
)
def test_only_what_a_sender_gives_is_read(change: dict[str, Any], message: str) -> None:
    with make_sender("shared_memory") as sender:
        sender.stage([("filling", torch.zeros(1024))])
        info = sender.stage([("a", torch.zeros(8))])
        with pytest.raises(ValueError, match=message):
            read({**info, **change})


def test_handles_of_gpu_memory_without_their_classes(worker: Any) -> None:
    shape, classes = torch.Size([640]), (torch.Tensor, torch.storage.UntypedStorage)
    arguments = (
        *(classes[0], shape, (1,), 0, classes[1], torch.uint8),
        *(3, b"handle", 640, 1024, False, b"counter", 8, b"event", True),
    )
    plain = ipc_plain(arguments)
    assert plain == [0, 3, b"handle", 640, 1024, False, b"counter", 8, b"event", True]
    assert worker.ipc_arguments(plain) == arguments
    assert rebuild_cuda_tensor.__code__.co_argcount == len(arguments)


def test_merged_has_every_gpus_handle() -> None:
    one, two = ({"names": ["a"], "ipc_handles": {uuid: [rank]}} for rank, uuid in enumerate(["GPU-a", "GPU-b"]))
    assert merged([one, two]) == {"names": ["a"], "ipc_handles": {"GPU-a": [0], "GPU-b": [1]}}
    assert merged([{"names": ["a"], "descriptor": 3}]) == {"names": ["a"], "descriptor": 3}


def test_nccl_ranks_of_replicas_follow_the_trainers() -> None:
    sender = make_sender("nccl", replicas=3, tensor_parallel_size=2)
    infos = [sender.init_info(replica) for replica in range(3)]
    assert [info["rank_offset"] for info in infos] == [1, 3, 5]
    assert {info["world_size"] for info in infos} == {7}
    assert {info["master_address"] for info in infos} == {"127.0.0.1"}
    assert len({info["master_port"] for info in infos}) == 1


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind is 'pickle': must be shared_memory, nccl or ipc"):
        make_sender("pickle")  # type: ignore[arg-type]


@pytest.fixture
def manifest() -> PushManifest:
    return PushManifest({"a": (2, 3), "b": (4,)})


def test_a_complete_push(manifest: PushManifest) -> None:
    manifest.enter(["b"], [[4]])
    with pytest.raises(ValueError, match=r"1 are missing from the push, among them \['a'\]"):
        manifest.must_be_complete()
    manifest.enter(["a", "lm_head.weight"], [[2, 3], [9, 9]])
    manifest.must_be_complete()
    assert manifest.fresh() == PushManifest({"a": (2, 3), "b": (4,)})


@pytest.mark.parametrize(
    ("names", "shapes", "message"),
    [
        (["c"], [[1]], "the engine's model has no c"),
        (["a", "a"], [[2, 3], [2, 3]], "a was sent twice in one push"),
        (["a"], [[3, 2]], r"a has shape \(3, 2\), the engine's \(2, 3\)"),
    ],
)
def test_what_does_not_belong(manifest: PushManifest, names: list[str], shapes: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        manifest.enter(names, shapes)


@pytest.mark.parametrize("tied", [True, False])
def test_manifest_of_a_checkpoint(
    make_checkpoint: Callable[..., Path], load: Callable[[Path], Any], tied: bool
) -> None:
    directory = make_checkpoint(tied=tied)
    model = load(directory)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert PushManifest.of_checkpoint(directory) == PushManifest(shapes)
    assert ("lm_head.weight" in shapes) != tied


@pytest.mark.usefixtures("_as_it_was")
def test_environment_binds_to_loopback_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    prepare_vllm_environment()
    assert os.environ["VLLM_HOST_IP"] == "127.0.0.1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    assert os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] == "0"
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    prepare_vllm_environment("10.0.0.5")
    assert os.environ["VLLM_HOST_IP"] == "10.0.0.5"
    assert "GLOO_SOCKET_IFNAME" not in os.environ
