"""Alembic migrations of the ledger; `fade.requests.tables.upgrade` applies them."""
