"""Measures the runtime on a device and writes a cost profile."""
