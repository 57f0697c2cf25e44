"""Attacks: what it takes to bring an erased concept back. Each gives a success rate with an interval."""
