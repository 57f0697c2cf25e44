"""Thin Prefect tasks, and the one file each that touches MLflow, DVC and Great Expectations."""
