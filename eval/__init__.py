"""How much quality a policy keeps, measured through the public API; not installed."""
