"""`python -m collab_service` is `collab`."""

from collab_service.cli.main import main

main()
