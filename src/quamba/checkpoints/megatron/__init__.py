"""Checkpoints of Megatron-LM that hold a Mamba2 model, such as nvidia/mamba2-8b-3t-4k."""
