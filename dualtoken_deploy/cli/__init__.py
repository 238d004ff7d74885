"""The command line: parse, one call, print. Results go to stdout, progress and errors to stderr."""

from dualtoken_deploy.cli.main import app, main

__all__ = ["app", "main"]
