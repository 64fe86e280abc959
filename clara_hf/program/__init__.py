"""What all programs share: arguments, run folders, files, errors and exit codes. None of it imports torch."""

from clara_hf.program.arguments import option, parse
from clara_hf.program.errors import UsageError, run_program
from clara_hf.program.files import read_json, write_json, write_text, written_beside
from clara_hf.program.folders import RunFolder


__all__ = [
    "RunFolder",
    "UsageError",
    "option",
    "parse",
    "read_json",
    "run_program",
    "write_json",
    "write_text",
    "written_beside",
]
