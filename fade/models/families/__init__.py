"""Families of base models, a file each: how a pipeline of its kind is told, encoded and decoded."""
