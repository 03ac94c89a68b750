"""What the teacher says the scores should be."""
