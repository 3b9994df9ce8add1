"""MLflow: runs, artefacts, registered versions."""
