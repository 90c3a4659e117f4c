"""Runs a pipeline block by block, and refuses one that cannot run so."""
