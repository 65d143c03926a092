"""Sums of squared gradients of single examples."""
