"""`python -m llmopt`."""

from llmopt.cli import main

main(prog_name="llmopt")
