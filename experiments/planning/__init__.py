"""Commands of paper 5: plans made, explained, and run for real."""
