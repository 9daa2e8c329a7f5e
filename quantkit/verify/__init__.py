"""Whether what lies on the disk is what runtimes expect: names, shapes, dtypes, config, and the bytes themselves."""
