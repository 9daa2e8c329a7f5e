"""Checkpoints of a hub, a bucket or a web server, read range by range through a cache with a bound."""
