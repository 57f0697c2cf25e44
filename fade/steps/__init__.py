"""The steps of the pipeline as plain functions with files in and files out.

DVC stages and Prefect tasks call the same functions: those of an erasure stand in fade/pipeline.py, those that
erasures share (catalog, base, judges) run as ``python -m fade.steps.NAME``.
Each file imports only what changes its output: a DVC stage depends on exactly those modules.
"""
