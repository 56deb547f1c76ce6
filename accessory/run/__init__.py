"""The life of one run: what it is and its course, lock and status, signals, resuming, saving, and what it reports."""
