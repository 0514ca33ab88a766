"""Other libraries that can compute with LongNet, each imported by its own module alone; and weights of others."""
