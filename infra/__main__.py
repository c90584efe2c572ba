"""`python -m infra` is `animator`, for machines where the code came without its console command."""

from infra.cli import main

if __name__ == "__main__":
    main()
