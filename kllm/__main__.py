"""`python -m kllm` is the `kllm` command."""

from kllm.cli.app import main

main()
