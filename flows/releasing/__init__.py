"""What a person approved goes live, what was taken back goes out, and pictures with what is live."""
