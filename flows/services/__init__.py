"""Long-running services: MLflow, Prefect, the HTTP intake, the picture service, and their middleware."""
