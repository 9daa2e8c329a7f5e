"""Which type each linear of an output gets, so that the output keeps a size and is predicted to lose least."""
