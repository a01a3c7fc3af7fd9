"""actor_train on Megatron-core: tensor, pipeline and data parallel, one process per rank."""
