"""actor_train on Megatron-core: tensor, pipeline, data and context parallel, one process per rank."""
