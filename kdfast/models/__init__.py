"""Readers: loaded, run, saved."""
