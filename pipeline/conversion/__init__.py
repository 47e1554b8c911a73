"""Masks of a benchmark from the annotations that its authors publish."""
