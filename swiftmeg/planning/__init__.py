"""`--dry_run true`: what a training command would do, found in one process without a GPU."""
