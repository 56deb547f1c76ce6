"""The life of one run: its identity and schedule, lock and status, signals, resuming, saving, and its report."""
