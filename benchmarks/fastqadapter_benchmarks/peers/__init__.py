"""Other ways to compute the same thing: what a benchmark measures against, and what a test trusts."""
