"""Results as text for people and as documents for --json, and the progress of running work; for the command line and
notebooks. Nothing here loads torch."""
