"""Programs that prepare an environment."""
