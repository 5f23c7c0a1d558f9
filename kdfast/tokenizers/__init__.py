"""Tokenizers as their files say, and what they make of texts."""
