"""The demonstration: train, compress to several sizes, load in a fresh process, compare."""
