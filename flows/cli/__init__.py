"""The command line ``fade``, a file a noun."""
