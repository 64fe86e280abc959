"""What all programs share: arguments, run folders, errors and exit codes."""
