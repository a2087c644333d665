"""Our models in other libraries, a file a library."""
