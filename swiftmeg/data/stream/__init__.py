"""Rows that are read, tokenised and packed while training (`--streaming`)."""
