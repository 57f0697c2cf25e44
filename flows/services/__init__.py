"""What stays up: MLflow, Prefect, the intake, the pictures, and what stands before them."""
