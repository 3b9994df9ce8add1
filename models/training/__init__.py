"""One method's training: batches, checkpoints, early stopping, its record in MLflow."""
