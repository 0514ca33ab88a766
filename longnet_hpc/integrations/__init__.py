"""Other libraries that can compute with LongNet; each is imported by its own module alone, and needed for it alone."""
