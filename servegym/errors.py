"""The one error that a user's input can raise."""


class InputError(ValueError):
    """Input that cannot be used; the command line prints it and leaves with exit code 2.

    Args:
        where: the file or object at fault, for example `trace.parquet` or `scenario chat`.
        field: the field or column, with the row where there is one, for example `prompt_tokens, row 17`.
        value: the offending value.
        hint: what to do about it.
    """

    def __init__(self, where: object, field: str, value: object, hint: str) -> None:
        self.where, self.field, self.value, self.hint = str(where), field, value, hint
        super().__init__(f"{where}: {field} = {value!r}: {hint}")
