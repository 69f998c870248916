"""The subcommands of `fastqadapter`, one a module, each with `main(argv)`; `cli` finds and runs them."""
