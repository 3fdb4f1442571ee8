"""The `mxn` command: one file per subcommand, heavy imports inside functions, so that help is quick."""
