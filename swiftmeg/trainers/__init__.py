"""Training methods: each a forward step and a loss; `run` hands them to Megatron's loop."""
