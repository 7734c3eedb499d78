"""The workload as a benchmark of flgo: it looks for a package with a module `core`."""
