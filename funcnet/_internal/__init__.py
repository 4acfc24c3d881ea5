"""Helpers that all of funcnet uses, and that are not for use outside it."""
