"""From a model and images to instances and files."""
