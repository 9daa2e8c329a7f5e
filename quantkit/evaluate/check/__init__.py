"""An evaluation against a baseline."""
