"""Metric modules of `evaluate`; installed as `clara_hf.metrics`."""
