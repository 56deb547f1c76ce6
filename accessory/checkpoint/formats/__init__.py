"""The file formats of checkpoints, one or two files each."""
