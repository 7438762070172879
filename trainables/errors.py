"""The errors that are the user's to mend; everything else is a defect of ours."""


class UserError(ValueError):
    """A file or a setting of the user's that cannot be used (exit code 2).

    The message says where, what was given, what is expected, and a way out.
    """

    exit_code = 2


class FileError(UserError):
    """What is wrong with one file of many: files with the same fault are told in one line."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where} {what}")
        self.where, self.what = where, what


class StorageError(OSError):
    """The study's storage refused to read or write (exit code 74)."""

    exit_code = 74
