"""Changes a pipeline, and its variables with it."""
