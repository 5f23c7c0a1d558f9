"""Data that is made, and not written by people: what `kdfast.augment` does."""
