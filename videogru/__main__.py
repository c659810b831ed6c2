"""`python -m videogru` is `videogru`."""

from videogru.cli.main import main

if __name__ == "__main__":
    main()
