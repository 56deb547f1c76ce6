"""Quantizes a base to two, three or four bits by calibration text, a block of the model at a time."""
