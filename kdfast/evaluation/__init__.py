"""Logits to answers to figures."""
