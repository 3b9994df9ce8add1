"""What all models share: errors, configurations, ragged rows, processes, the machine. No table, no MLflow."""
