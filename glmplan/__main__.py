"""`python -m glmplan`."""

from glmplan.cli.app import main

main()
