"""From annotations to samples and batches."""
