"""The command `clara`."""


def main() -> int:
    return 0
