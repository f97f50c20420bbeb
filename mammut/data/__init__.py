"""From stored pictures and texts to batches."""
