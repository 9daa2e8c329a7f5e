"""Sources of any size -> a calibration set: a small .jsonl without duplicates, balanced over domains and scripts."""
