"""Find and repair what is wrong with a dataset."""
