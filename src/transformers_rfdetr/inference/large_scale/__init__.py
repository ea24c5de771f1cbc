"""Predict more images than one process can: images, videos, Parquet and tar files to Parquet, with Ray or without."""
