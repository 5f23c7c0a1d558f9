"""Files to windows on disk."""
