"""One module a file format. Each gives a `Checkpoint`: arrays by the file's own names, and what the file says of them.

Arrays are views of the memory-mapped file: what is not asked for is never read.
"""
