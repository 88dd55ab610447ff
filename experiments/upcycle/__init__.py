"""Paper 1's tools to take home: upcycle a person's own Hugging Face checkpoint, check it, and go on from it."""
