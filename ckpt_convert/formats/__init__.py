"""Readers of file formats, one module for each. They return arrays by the file's own names, and stated settings.

Arrays are read on demand from the memory-mapped file.
"""
