"""Stands in for cuda-python; see runtime.py."""
