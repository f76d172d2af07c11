"""Device code: what the operators run, one module a backend."""
