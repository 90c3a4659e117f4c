"""What is known about a pipeline without running it: shapes, and a summary of its steps."""
