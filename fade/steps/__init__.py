"""The steps of the pipeline as plain functions with files in and files out.

A DVC stage runs one as ``python -m fade.steps.NAME`` and a Prefect task calls the same function.
Each file imports only what changes its output: a DVC stage depends on exactly those modules.
"""
