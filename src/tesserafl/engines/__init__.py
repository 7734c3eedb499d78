"""Where and when clients compute: `local` in this process or in worker processes."""
