"""One experiment a file; each defines EXPERIMENT."""
