"""The command `lcia`, and `python -m lcia`."""

from lcia.machine import start_again_without_small_caches


def main() -> None:
    start_again_without_small_caches()
    from lcia.cli import main as command  # late: what is loaded before is loaded twice

    command()


if __name__ == "__main__":
    main()
