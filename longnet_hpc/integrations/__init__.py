"""Models, weights and formats of others."""
