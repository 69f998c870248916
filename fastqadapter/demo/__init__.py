"""What `fastqadapter demo` trains on: a real small model, fetched once, and a preference set made by a program."""
