"""The `llada-trm` command; each subcommand is one module."""
