"""Great Expectations: the suite over the splits, and its pages."""
