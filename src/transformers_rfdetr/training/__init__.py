"""The training recipe and the run."""
