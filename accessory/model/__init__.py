"""The decoder and its layers, driven by `ModelArgs`: one file a concern."""
