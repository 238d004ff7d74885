"""`python -m dualtoken_deploy` is `dualtoken`."""

from dualtoken_deploy.cli import main

if __name__ == "__main__":
    main()
