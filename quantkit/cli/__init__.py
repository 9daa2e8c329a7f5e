"""The command line: the only part of quantkit that prints. Results go to stdout, progress and errors to stderr."""
