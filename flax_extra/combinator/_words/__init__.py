"""The combinators, each written from those before it."""
