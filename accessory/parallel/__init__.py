"""Who computes what: process groups, tensor and data parallelism, and how ranks agree, meet and fail."""
