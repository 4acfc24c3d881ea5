"""Derivatives by their definition, from R to matrices."""
