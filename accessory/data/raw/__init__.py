"""Raw text for pretraining: many files, read as rows of equally many tokens, in one order whatever the ranks."""
