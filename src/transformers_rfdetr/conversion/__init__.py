"""Convert checkpoints from and to rfdetr."""
