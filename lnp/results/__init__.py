"""What is returned to the user, and the computations that make it."""
