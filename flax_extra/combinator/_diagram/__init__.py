"""The wiring picture of a pipeline: what it shows, where that stands, and the SVG."""
