"""How much memory a step takes (the plan), and recomputing blocks where that is too much."""
