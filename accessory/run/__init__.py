"""The life of one run: its lock and status, signals, resuming, saving, and what it reports step by step."""
