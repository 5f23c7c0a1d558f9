"""Data that is made, and not written by people: what `kdfast.augment` and `kdfast.questions` do."""
