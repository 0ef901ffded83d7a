"""swiftmeg: pre-train and fine-tune Hugging Face models through NVIDIA's Megatron-Core."""

__version__ = "0.1.0"
