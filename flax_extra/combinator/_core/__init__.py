"""What a pipeline is: signatures, children, how linen binds them, and how they run."""
