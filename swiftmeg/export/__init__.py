"""Weights between Hugging Face folders and live Megatron models, in any layout."""
