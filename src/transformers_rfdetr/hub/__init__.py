"""Load from and push to the Hugging Face Hub."""
