"""From a request to a registered adapter."""
