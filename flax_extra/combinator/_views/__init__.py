"""What is known without running: shapes, a summary of the steps, where arrays lie."""
