"""From files to micro-batches: readers, records, prompt templates, masking, packing, the resumable loader."""
