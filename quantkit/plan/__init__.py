"""Recipe + family + headers -> what happens to every tensor, and what that takes. No weight is read."""
