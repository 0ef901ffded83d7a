"""Tokenised sets: built once in the cache or row by row, packed, and shown to a person."""
