"""Answers from a Hugging Face folder, by transformers: in a chat or for the rows of a dataset."""
