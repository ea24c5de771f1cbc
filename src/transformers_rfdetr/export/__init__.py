"""Export a model to other runtimes."""
