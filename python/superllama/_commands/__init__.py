"""The subcommands that do more than print: front doors, settings, completion, downloads."""
