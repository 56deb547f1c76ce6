"""Figures of a model: tasks of the lm-eval harness, perplexity, and metrics of texts. Above MetaModel, which scores."""
