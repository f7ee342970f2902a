"""Registered callbacks, one file each."""
