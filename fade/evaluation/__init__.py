"""What was reached: judges, accuracies with intervals, drift, sheets."""
