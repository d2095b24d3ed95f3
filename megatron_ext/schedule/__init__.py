"""Micro-batches through a model on its pipeline, for training and for evaluation."""
