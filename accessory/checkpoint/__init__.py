"""Checkpoints read and written: streaming reader, re-sharding, trained parts, training state."""
