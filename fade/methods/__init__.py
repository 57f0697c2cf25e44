"""Methods: ways to erase a concept, ours and the published ones, each its own file.

Each leaves an adapter, so that what measures ours measures them.
"""
