"""The conversion itself: source shards -> layer -> expert -> quantised tensor -> sinks."""
