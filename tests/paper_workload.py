"""The paper's run on 8 GPUs, as a cluster's plan sees it.

    from paper_workload import WORK

tests/conftest.py makes the module importable.
"""

from __future__ import annotations

from rhythm.cluster.plan.dimensions import Workload

WORK = Workload(
    prompts_per_batch=64,
    responses_per_prompt=8,
    mini_batch_size=32,
    micro_batch_size=4,
    max_new_tokens=896,
    token_chunk=1024,
    value_bytes=2,
    steps=500,
    reference=False,
    separate_attn=False,
    sampled_layers=5,
)
