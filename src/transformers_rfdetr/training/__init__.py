"""Fine-tuning: the arguments, the trainer, and what a run writes."""
