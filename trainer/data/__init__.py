"""Data: where documents come from, how they become tokens, in which order and batches a rank sees them."""
