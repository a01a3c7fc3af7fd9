"""actor_infer: responses by vLLM, with the trainer's weights pushed into it. Only `worker` imports vLLM itself."""
