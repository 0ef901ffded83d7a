"""Where rows come from: `--dataset`, registered sets, files and hubs, and their formats."""
