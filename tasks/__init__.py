"""Thin Prefect tasks, and a room for each tool they touch: MLflow, DVC, Great Expectations."""
