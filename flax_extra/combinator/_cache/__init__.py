"""What layers remember from block to block of a stream."""
