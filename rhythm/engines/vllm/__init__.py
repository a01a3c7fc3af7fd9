"""actor_infer on vLLM, which gets the trainer's weights by weight sync. Only `worker` imports vLLM at the top level."""
