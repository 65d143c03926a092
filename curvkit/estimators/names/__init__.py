"""Estimators by name: what can be typed, and what other packages offer."""
