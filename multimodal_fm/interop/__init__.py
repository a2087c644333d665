"""Models of other libraries as ours, and ours in theirs: a file a library."""
