"""Decoders of grouped-query attention: one attention, one description of routing, and families as rows of a table."""
