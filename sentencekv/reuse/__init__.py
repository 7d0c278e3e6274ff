"""Cross-prompt reuse: what was read for one prompt serves the next, similar one."""
