"""All records of a data file at once, and some that are hard to read."""

from accessory.data import readers

RECORDS = [{"a": "é\u2028 \n"}, {"a": {"b": [1, "]"]}}, {}, {"a": "last"}]


def read_records(path, notes=None):
    """In a list; what is noted goes to `notes`."""
    return list(readers.read_records(path, notes))
