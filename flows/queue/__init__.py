"""Requests worked off when they are due: one after the other, on a schedule, within their deadlines."""
