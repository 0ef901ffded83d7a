"""Model families: how a Hugging Face checkpoint becomes a Megatron-Core GPT model and back."""
