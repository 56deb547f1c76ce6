"""What a step needs of memory: the plan, and blocks recomputed where that is too much."""
