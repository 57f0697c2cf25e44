"""Thin Prefect tasks, and the files that touch MLflow (_mlflow, _runs, _tracking), DVC and Great Expectations."""
