"""Erasures made to be compared: each from spec to a row of figures in one process, without orchestrator or registry."""
