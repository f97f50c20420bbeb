"""Stands in for cuda-python; see bindings/runtime.py."""
