"""`python -m cakekv` runs the command cakekv, also where scripts are not on the path."""

from cakekv.cli.main import main

if __name__ == "__main__":
    main()
