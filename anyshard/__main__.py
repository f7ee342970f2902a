"""`python -m anyshard` is the console script."""

from anyshard.launch.cli import main

if __name__ == "__main__":
    main()
