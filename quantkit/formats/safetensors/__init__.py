"""safetensors files: hostile-proof headers, ranged reads, writes at offsets."""
